"""Imports run one way, Triton stays in the kernels, and the package needs nothing but its core dependencies."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A unit is a module or package right under lrlora_ops; it may import itself and the layers above it in this list.
# What is not listed (the package itself, the command line and what it is made of) comes last.
LAYERS = [
    {"rank_table", "routing", "_sharding", "_storage"},
    {"reference", "eager", "kernels", "_checks"},
    {"ops"},
    {"modules"},
    {"methods"},
    {"adapters"},
    {"integrations"},
    {"doctor", "plan"},
]
PARTS = {
    "_checkpoint": "adapters",
    "_export": "adapters",
    "_coverage": "doctor",
    "_forgotten": "adapters",
    "_metrics": "adapters",
    "_probe": "doctor",
    "_read_past": "adapters",
    "_targets": "adapters",
    "_trace": "plan",
    "apply": "adapters",
    "_gated": "eager",
    "_live": "eager",
    "_sinc": "eager",
    "_sinc_gemm": "eager",
}  # modules that are one unit with another
# Adapters.callback() and the like, the record of a run that it leaves for the command line, and what only tensors on a
# GPU need, inside a function.
UPWARD_ON_USE = {("adapters", "integrations"), ("integrations", "finetune"), ("routing", "ops")}

OPTIONAL = ["triton", "transformers", "tokenizers", "accelerate", "peft", "trl", "typer", "rich", "matplotlib"]
OPTIONAL += ["bitsandbytes", "torchao", "jinja2", "pydantic", "yaml"]

# Without its finder a distribution is as good as not installed, for try-imports and for find_spec alike.
HIDE_OPTIONAL = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hide = lambda name, *args: None if name.partition(".")[0] in {OPTIONAL} else find_spec(name, *args)
PathFinder.find_spec = staticmethod(hide)  # some libraries ask an instance of it
"""


def unit_of(*names: str) -> str:
    return PARTS.get(names[0], names[0])


def layer(unit: str) -> int:
    return next((i for i, units in enumerate(LAYERS) if unit in units), len(LAYERS))


def imports(node: ast.AST, on_use: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield what is imported, and whether that happens only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, on_use) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from ((f"{child.module}.{alias.name}", on_use) for alias in child.names)
        yield from imports(child, on_use or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def package_imports() -> Iterator[tuple[Path, str, str, bool]]:
    """Yield (file, unit that imports, dotted name imported, on use) of every import in the package."""
    for folder, prefix in ((ROOT / "lrlora_ops", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            unit = unit_of(*prefix, *path.relative_to(folder).with_suffix("").parts)
            for name, on_use in imports(ast.parse(path.read_text())):
                yield path.relative_to(ROOT), unit, name, on_use


def test_imports_run_one_way():
    wrong = []
    for path, unit, name, on_use in package_imports():
        package, *names = name.split(".")
        imported = unit_of(*names, "")
        if package != "lrlora_ops" or imported == unit or (on_use and (unit, imported) in UPWARD_ON_USE):
            continue
        if layer(imported) >= layer(unit) and layer(unit) < len(LAYERS):
            wrong.append(f"{path} imports {name}")
    assert not wrong


def test_methods_know_modules_only_through_rank_tables():
    names = [name for _, unit, name, _ in package_imports() if unit == "methods"]
    known = {name.split(".")[1] for name in names if name.startswith("lrlora_ops.")}
    assert known <= {"methods", "rank_table"}


def test_triton_stays_in_the_kernels():
    users = {unit for _, unit, name, _ in package_imports() if name.split(".")[0] == "triton"}
    assert users == {"kernels"}


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_import_works_without_any_optional_dependency():
    run(HIDE_OPTIONAL + "import lrlora_ops; [getattr(lrlora_ops, name) for name in lrlora_ops.__all__]")


def test_import_loads_no_optional_dependency():
    # Triton is torch's to load or not.
    run(f"import sys, lrlora_ops; loaded = sorted(set({OPTIONAL[1:]}) & set(sys.modules)); assert not loaded, loaded")
