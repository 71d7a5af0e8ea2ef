"""``lrlora bench``: the benchmarks of the source tree, on a model's layers or other shapes, or the whole suite."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.machine import pick_device
from lrlora_ops.finetune.planned import distinct_layers

_TOKENS = {"cuda": 4096, "cpu": 512}
_RANK = 16
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class BenchSettings:
    """The options of ``lrlora bench``; see its help. ``words`` are a MODEL, or files for the tables, or for pytest.

    Raises:
        CommandError: A number is out of its range, or options do not go together.
    """

    words: tuple[str, ...]
    shapes: tuple[str, ...]
    experts: tuple[str, ...]
    tokens: int | None
    rank: int | None
    targets: tuple[str, ...]
    dtype: str
    device: str
    table: bool

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 1), ("tokens", self.tokens, 2)):
            if value is not None and value < least:
                raise CommandError(f"--{name} is {value}; it must be at least {least}")
        if self.model is None and (self.tokens or self.targets):
            raise CommandError("--tokens and --targets are for a MODEL: name its directory")
        if not self.own and (self.rank or self.dtype != "auto" or self.device != "auto"):
            raise CommandError("--rank, --dtype and --device are for layers: name a MODEL, --shape or --experts")
        if self.own and (self.table or len(self.words) > (self.model is not None)):
            other = "--table" if self.table else f"{self.words[-1]}, which goes to pytest,"
            raise CommandError(f"{other} does not go with layers: leave it out, or MODEL, --shape and --experts")

    @property
    def model(self) -> str | None:
        """Its directory, if there is one."""
        return None if self.table or not self.words or self.words[0].startswith("-") else self.words[0]

    @property
    def own(self) -> bool:
        """Whether layers are named."""
        return bool(self.model or self.shapes or self.experts)


def run_bench(settings: BenchSettings, console: Console) -> int:
    """Run what is asked for; returns the exit code.

    Raises:
        CommandError: There is no source tree, or the layers cannot be used.
    """
    if settings.own:
        bench_own(settings, console)
        return 0
    suite = ["pytest", "benchmarks/", "--benchmark-only", *settings.words]
    command = ["benchmarks.report", *map(os.path.abspath, settings.words)] if settings.table else suite
    return subprocess.run([sys.executable, "-m", *command], cwd=_source_tree()).returncode


def bench_own(settings: BenchSettings, console: Console) -> None:
    """Print the tables of a model's layers, one of each size, and of the shapes.

    Raises:
        CommandError: There is no source tree, a library that the benchmarks need is missing, the model cannot be read,
            a shape is none, or a peer has made the GPU unusable.
    """
    own = _import_own()
    device = pick_device(settings.device)
    try:
        cases = _cases(own, settings, device, console)
    except ValueError as error:
        raise CommandError(str(error)) from error

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(f"{len(cases)} layers on {device.type}; who agrees with the fp64 oracle is timed")
    try:
        say(own.run(cases, device, say))
    except own.ContextLost as lost:
        raise CommandError(f"{lost.args[0]} has made the GPU unusable for this process: {lost.__cause__}") from lost


def _cases(own: Any, settings: BenchSettings, device: torch.device, console: Console) -> list[Any]:
    dtype = _DTYPES[device.type] if settings.dtype == "auto" else getattr(torch, settings.dtype)
    shapes = [*map(own.parse_shape, settings.shapes), *map(own.parse_experts, settings.experts)]
    found = [(shape, dtype) for shape in shapes]
    if settings.model is not None:
        model, targets = Path(settings.model), settings.targets or ("all-linear",)
        for module, layer in distinct_layers(model, targets, settings.tokens or _TOKENS[device.type], settings.dtype):
            try:
                shape = own.shape_of(model.resolve().name, layer)
            except ValueError as error:
                console.print(f"left out: {error}", highlight=False, soft_wrap=True)
            else:
                found.append((shape, next(module.parameters()).dtype))
    return [own.case_of(shape, settings.rank or _RANK, dtype, device) for shape, dtype in found]


def _source_tree() -> Path:
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "report.py").exists():
        raise CommandError(
            f"the benchmarks are not in {root}: they are part of the source tree, not of the installed package; in a "
            "checkout of it, pip install -e '.[bench]' and run lrlora bench there"
        )
    return root


def _import_own() -> Any:
    """The benchmarks, which are no installed package."""
    root = str(_source_tree())
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        return importlib.import_module("benchmarks.own")
    except ImportError as error:
        raise CommandError(f"the benchmarks cannot be imported ({error}): pip install -e '.[bench]'") from error
