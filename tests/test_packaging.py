"""Every way to have lrlora_ops brings the kernels along and leaves the name ``kernels`` to Hugging Face's package."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAND_IN = "is_stand_in = True"

PROBE = """
import kernels, lrlora_ops, lrlora_ops.kernels.shrink
from transformers.utils.import_utils import is_kernels_available
assert kernels.is_stand_in and is_kernels_available()
print(lrlora_ops.__file__, lrlora_ops.kernels.shrink.__file__)
"""

WITHOUT_TRITON = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hidden = {"triton", "transformers"}
hide = lambda name, *args: None if name.partition(".")[0] in hidden else find_spec(name, *args)
PathFinder.find_spec = staticmethod(hide)  # some libraries ask an instance of it
import lrlora_ops
try:
    import lrlora_ops.kernels.shrink
except ModuleNotFoundError as error:
    print(lrlora_ops.__file__, error.name)
"""

FORMS = {
    "wheel": ("build_wheel", {}),
    "editable": ("build_editable", {}),
    "editable, strict": ("build_editable", {"editable_mode": "strict"}),
    "editable, compat": ("build_editable", {"editable_mode": "compat"}),
    "source tree": None,
}


@dataclass
class Installation:
    """An environment that has lrlora_ops in one form, all its dependencies, and a distribution named kernels."""

    form: str
    source: Path
    environment: Path

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(self.environment)}))

    def run(self, *command: str) -> str:
        """What ``bin/<command>`` prints; the working directory holds the sources only where they are the form."""
        cwd = self.source if self.form == "source tree" else self.environment
        return check([str(self.environment / "bin" / command[0]), *command[1:]], cwd)


def check(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_source(target: Path) -> Path:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    for name in ("lrlora_ops", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(source: Path, hook: str, settings: dict[str, str]) -> Path:
    """The wheel that a front end like pip gets from the build backend."""
    code = f"from setuptools import build_meta; build_meta.{hook}('dist', {settings})"
    check([sys.executable, "-c", code], source)
    [wheel] = source.glob("dist/*.whl")
    return wheel


@pytest.fixture(scope="module", params=FORMS)
def installation(request, tmp_path_factory) -> Installation:
    folder = tmp_path_factory.mktemp("installation")
    it = Installation(request.param, copy_source(folder / "source"), folder / "environment")
    venv.create(it.environment, symlinks=True)
    # Behind its own site-packages the environment sees this one's: torch, transformers, and pip.
    outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (it.site_packages / "dependencies.pth").write_text("\n".join(outer))
    install_stand_in(it.site_packages)
    if FORMS[it.form]:
        wheel = build(it.source, *FORMS[it.form])
        it.run("python", "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return it


def install_stand_in(site_packages: Path) -> None:
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    info = site_packages / "kernels-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n"
    )
    (site_packages / "kernels").mkdir()
    (site_packages / "kernels" / "__init__.py").write_text(STAND_IN)


def test_kernels_are_found_and_shadow_nothing(installation):
    package, shrink = map(Path, installation.run("python", "-c", PROBE).split())
    if installation.form == "wheel":
        assert package == installation.site_packages / "lrlora_ops" / "__init__.py"
        assert shrink == installation.site_packages / "lrlora_ops" / "kernels" / "shrink.py"
    else:
        assert package.resolve() == installation.source / "lrlora_ops" / "__init__.py"
        assert shrink.resolve() == installation.source / "kernels" / "shrink.py"


@pytest.mark.parametrize("installation", ["wheel", "source tree"], indirect=True)
def test_import_works_without_triton_and_transformers(installation):
    package, missing = installation.run("python", "-c", WITHOUT_TRITON).split()
    assert Path(package).is_relative_to(installation.environment.parent)
    assert missing == "triton"


def test_wheel_holds_every_module_and_installs_the_command(tmp_path):
    source = copy_source(tmp_path / "source")
    expected = {str(path.relative_to(source)) for path in (source / "lrlora_ops").rglob("*.py")}
    expected |= {f"lrlora_ops/kernels/{path.name}" for path in (source / "kernels").glob("*.py")}
    wheel = zipfile.ZipFile(build(source, "build_wheel", {}))
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected
    templates = {str(path.relative_to(source)) for path in (source / "lrlora_ops").rglob("templates/*")}
    assert templates and templates <= set(wheel.namelist())
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert b"lrlora = lrlora_ops.cli:main" in wheel.read(entry_points)
