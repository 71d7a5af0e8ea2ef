"""``python -m benchmarks.tune``: looks for faster tiles on this machine's GPU, and writes them to kernels/_measured.py.

The search is that of ``lrlora tune``, for one shape, dense and grouped: its tiles are shipped, for all shapes of that
GPU that nobody has tuned.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import report
from benchmarks.static_report import cases as static_cases
from lrlora_ops.kernels import _configs, _measured
from lrlora_ops.kernels._configs import Tile
from lrlora_ops.ops._backends import launcher
from lrlora_ops.tuning.calls import Call
from lrlora_ops.tuning.search import Gpu, search

PATH = Path(_measured.__file__)
_RANKED = ("shrink", "expand", "gram", "shrink_gram")
_OF_WEIGHTS = ("sinc_weight", "sinc_gradients")


@dataclass(frozen=True)
class Key:
    """An entry of the table of measured tiles."""

    kernel: str
    capacity: int
    itemsize: int = 2

    def __str__(self) -> str:
        return f"{self.kernel}, capacity {self.capacity}, {self.itemsize} bytes"

    @property
    def entry(self) -> tuple[str, int, int]:
        return (self.kernel, self.capacity, self.itemsize)

    def calls(self, device: str) -> list[Call]:
        """The launches that a tile is judged by, on tensors of a device."""
        if self.kernel == "grouped_gemm":
            layouts, rank = (("grouped",) if self.capacity else ("few rows",)), 16
        else:
            layouts = ("weight",) if self.kernel in _OF_WEIGHTS else ("dense", "grouped")
            rank = self.capacity
        cases = [static_cases.Case("", self.kernel, rank, "bf16", "bf16", layout) for layout in layouts]
        calls = [call_of(case, device) for case in cases]
        if self.kernel == "sinc_gradients":  # alone: with a weight it would write that over what it reads
            calls[0].arguments["weight"] = None
        return calls


KEYS = [Key(kernel, capacity) for kernel in (*_RANKED, *_OF_WEIGHTS) for capacity in static_cases.CAPACITIES]
KEYS += [Key("grouped_gemm", many) for many in (0, 1)]


class _Random(TorchFunctionMode):
    """Tensors that are made empty hold random numbers: kernels are not timed on whatever memory holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.Tensor.new_empty) and made.is_floating_point() and made.is_cuda:
            made.normal_()
        return made


def call_of(case: static_cases.Case, device: str) -> Call:
    """What the static report launches for a case, on tensors of ``device``."""
    calls: list[Call] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., None]:
            bind = inspect.signature(launcher(name)).bind
            return lambda *args, **kwargs: calls.append(Call(name, bind(*args, **kwargs).arguments))

    with mock.patch.object(static_cases, "primitives", Recorder()), torch.device(device), _Random():
        static_cases.launch(case)
    (call,) = calls
    return call


def write(path: Path, device: str, entries: Mapping[tuple[str, int, int], Tile], where: str) -> None:
    """Put a device's tiles into the table, with where they come from; other devices keep theirs."""
    head, _, table = path.read_text().partition("MEASURED: ")
    annotation, _, literal = table.partition(" = ")
    notes = dict(line[2:].split(": ", 1) for line in head.splitlines() if line.startswith("# ")) | {device: where}
    documentation = "\n".join(line for line in head.splitlines() if not line.startswith("# ")).rstrip()
    tiles = ast.literal_eval(literal) | {device: {key: astuple(tile) for key, tile in entries.items()}}
    lines = [documentation, "", *(f"# {name}: {note}" for name, note in sorted(notes.items()))]
    lines += [f"MEASURED: {annotation} = {{"]
    for name, own in sorted(tiles.items()):
        rows = (f'        ("{key[0]}", {key[1]}, {key[2]}): {own[key]},' for key in sorted(own))
        lines += [f'    "{name}": {{', *rows, "    },"]
    path.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    names = sorted({key.kernel for key in KEYS})
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--capacities", nargs="+", type=int, help="ranks' capacities; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--output", type=Path, default=PATH, help="default: kernels/_measured.py")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU: tiles can be compiled without one (python -m benchmarks.static), not timed")
    keys = [k for k in KEYS if k.kernel in arguments.kernels and k.capacity in (arguments.capacities or [k.capacity])]
    device, began, entries = torch.cuda.get_device_name(), time.monotonic(), dict(_configs.measured())
    about = report.environment(torch.device("cuda"), [])
    where = f"{about['date'][:10]}, commit {about['commit']}, torch {about['versions']['torch']}, "
    where += f"triton {about['versions']['triton']}, {static_cases.SHAPE}"
    if not arguments.output.exists():
        arguments.output.write_text(PATH.read_text())
    with Gpu(arguments.jobs) as gpu:
        for key in keys:
            calls = key.calls("cuda")
            (asked, shipped), *_ = (item for call in calls for item in call.keys().items() if item[0][0] == key.kernel)
            result = search(asked, shipped, calls, gpu)
            entries.pop(key.entry, None)
            if result.tile != shipped:
                entries[key.entry] = result.tile
            write(arguments.output, device, entries, where)  # a run that is stopped loses nothing
            gain = f"{1e3 * result.seconds:.4f} ms, shipped {1e3 * result.shipped_seconds:.4f} ms"
            print(f"{time.monotonic() - began:4.0f} s  {key}: {astuple(result.tile)}, {gain}", flush=True)


if __name__ == "__main__":
    main()
