"""docs/extending.md, word for word: its test, of its kernel in its places; in the slow tier its commands as well."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest

from lrlora_ops import eager, kernels
from lrlora_ops.ops import _backends
from tests._pages import ROOT, blocks, commands, run_commands, write_files

primitives = pytest.importorskip("lrlora_ops.kernels.primitives", reason="needs triton")
BLOCKS = {block.file: block for block in blocks("extending", "python")}
NEW_MODULE = "kernels/scaled_grouped_gemm.py"
ADDED = {"triton": ("kernels/primitives.py", primitives), "eager": ("lrlora_ops/eager.py", eager)}

BLOCKS["tests/test_scaled_grouped_gemm.py"].run(globals())  # defines a test, which is run here


@pytest.fixture(scope="module", autouse=True)
def in_place(tmp_path_factory):
    """The page's code where it says: a module of its own, and the end of copies of two others."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / NEW_MODULE.rpartition("/")[2]).write_text(BLOCKS[NEW_MODULE].code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "__path__", [*kernels.__path__, str(folder)])
        for backend, (place, module) in ADDED.items():
            scope = dict(vars(module), __all__=[])
            BLOCKS[place].run(scope)
            patch.setitem(_backends._FUNCTIONS, backend, _backends._without_dispatch(SimpleNamespace(**scope)))
        yield


@pytest.mark.slow
def test_commands(tmp_path):
    """In a copy of the source tree, each in a process of its own: the page's test passes, its kernel compiles."""
    for name in ("lrlora_ops", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write_files("extending", tmp_path)
    tested, compiled = run_commands(commands("extending"), tmp_path)
    assert re.search(r"^12 passed", tested, re.MULTILINE), tested
    assert re.search(r"grouped_gemm_kernel registers \d+ spills 0 tensor cores .*HGMMA", compiled), compiled
