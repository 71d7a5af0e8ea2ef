"""``python -m benchmarks.tune``: looks for faster tiles on this machine's GPU, and writes them to kernels/_measured.py.

For each kernel and capacity: candidates by the dozen, compiled in parallel as the static report compiles them; those
that spill or do not fit are dropped; the others take turns, by graph replays, on a dense and on a grouped problem. The
tile that is shipped is the first candidate, and stays unless another one is faster by more than ``MARGIN``.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import report
from benchmarks.static_report import cases as static_cases
from benchmarks.timers import timer_for
from benchmarks.timing import interleave
from lrlora_ops.kernels import _configs, _measured, primitives
from lrlora_ops.kernels._configs import Tile

MARGIN = 0.02
PATH = Path(_measured.__file__)
_RANKED = ("shrink", "expand", "gram", "shrink_gram")
_BLOCKS, _WARPS, _STAGES = (32, 64, 128, 256), (4, 8), (2, 3, 4, 5)
_SECONDS = 1.0  # of rounds, for each kernel and capacity


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

    @property
    def shipped(self) -> Tile:
        if self.kernel == "grouped_gemm":
            return _configs.GEMM_CONFIGS[_configs.backend(), self.itemsize][self.capacity]
        return _configs.CONFIGS[_configs.backend(), self.itemsize][self.kernel][self.capacity]

    def cases(self, target: str) -> list[static_cases.Case]:
        """The launches that a tile is judged by."""
        if self.kernel == "grouped_gemm":
            layouts, rank = (("grouped",) if self.capacity else ("few rows",)), 16
        else:
            layouts, rank = ("dense", "grouped"), self.capacity
        return [static_cases.Case(target, self.kernel, rank, "bf16", "bf16", layout) for layout in layouts]


KEYS = [Key(kernel, capacity) for kernel in _RANKED for capacity in static_cases.CAPACITIES]
KEYS += [Key("grouped_gemm", many) for many in (0, 1)]


def candidates(key: Key, max_shared: int) -> list[Tile]:
    """The shipped tile, then all others whose pipeline fits into ``max_shared`` bytes by a rough count.

    The step along the rank follows from the capacity, but for expand; the base product's along K is 32 or 64.
    """
    shipped = key.shipped
    steps = {"expand": (16, 32), "grouped_gemm": (32, 64)}.get(key.kernel, (shipped.block_r,))
    found = [shipped]
    for block_m, block_n, step, warps, stages in product(_BLOCKS, _BLOCKS, steps, _WARPS, _STAGES):
        tile = Tile(block_m, block_n, step, warps, stages)
        if key.kernel == "expand" and step > key.capacity:
            continue
        if tile != shipped and shared_bytes(key, tile) <= max_shared and accumulators(key, tile) <= 128:
            found.append(tile)
    return found


def shared_bytes(key: Key, tile: Tile) -> int:
    """What the stages of a tile's pipeline hold: the operands of one step."""
    m, n, r = tile.block_m, tile.block_n, tile.block_r
    step = {"expand": m * r + r * n, "grouped_gemm": m * r + r * n}.get(key.kernel, m * n + max(m, n) * r)
    return tile.num_stages * key.itemsize * step


def accumulators(key: Key, tile: Tile) -> float:
    """fp32 registers per thread for the sums of a tile."""
    sides = {"shrink": (tile.block_m, tile.block_r), "shrink_gram": (tile.block_m, tile.block_r)}
    sides["gram"] = (tile.block_n, tile.block_r)
    m, n = sides.get(key.kernel, (tile.block_m, tile.block_n))
    return m * n / (32 * tile.num_warps)


@contextmanager
def pinned(key: Key, tile: Tile) -> Iterator[None]:
    """The launchers use this tile."""
    table = _configs.measured()
    before = table.get(key.entry)
    table[key.entry] = tile
    try:
        yield
    finally:
        del table[key.entry]
        if before is not None:
            table[key.entry] = before


class _Random(TorchFunctionMode):
    """Tensors that are made empty hold random numbers: kernels are not timed on whatever memory holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.Tensor.new_empty) and made.is_floating_point() and made.is_cuda:
            made.normal_()
        return made


def call_of(case: static_cases.Case, device: str) -> Callable[[], object]:
    """What the static report launches for a case, on tensors of ``device``, ready to be called again and again."""
    calls: list[Callable[[], object]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: calls.append(partial(getattr(primitives, name), *args, **kwargs))

    with mock.patch.object(static_cases, "primitives", Recorder()), torch.device(device), _Random():
        static_cases.launch(case)
    (call,) = calls
    return call


def fits(key: Key, target: str, tile: Tile) -> bool:
    """Whether the tile's code runs on the target and spills nothing. For a process of its own: see ``capture``."""
    from benchmarks.static_report.capture import capture
    from benchmarks.static_report.code import read_codes
    from benchmarks.static_report.targets import TARGETS

    limits = TARGETS[target]
    try:
        with pinned(key, tile):
            launches = [launch for case in key.cases(target) for launch in capture(limits, call_of(case, "cpu"))]
        codes = read_codes([launch.compiled for launch in launches])
    except Exception:  # what does not compile does not fit
        return False
    return all(
        not code.spills
        and code.shared <= limits.max_block_shared
        and limits.blocks_per_multiprocessor(code.registers, code.shared, launch.compiled.metadata.num_warps) >= 1
        for launch, code in zip(launches, codes, strict=True)
    )


def measure(key: Key, tiles: Sequence[Tile], target: str) -> dict[Tile, float]:
    """Seconds that the launches of each tile take on this machine's GPU, the medians of interleaved rounds, summed."""
    device = torch.device("cuda")
    total: dict[Tile, float] = dict.fromkeys(tiles, 0.0)
    for case in key.cases(target):
        call, pool, timers = call_of(case, "cuda"), torch.cuda.graph_pool_handle(), {}
        for tile in tiles:
            with pinned(key, tile):
                timers[str(astuple(tile))] = timer_for(call, device, pool)
        samples, failed = interleave(timers, device, _SECONDS)
        for tile in tiles:
            name = str(astuple(tile))
            total[tile] += float("inf") if name in failed else statistics.median(samples[name])
    return total


def choose(times: Mapping[Tile, float], shipped: Tile) -> Tile:
    """The fastest tile, but the shipped one unless it is beaten by more than ``MARGIN``."""
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - MARGIN) * times[shipped] else shipped


def tune(
    keys: Iterable[Key],
    max_shared: int,
    which_fit: Callable[[Key, list[Tile]], list[bool]],
    times_of: Callable[[Key, list[Tile]], dict[Tile, float]],
    found: Callable[[Key, Tile, float, float], None],
) -> None:
    """For each key, hand its new tile on to ``found``, with its seconds and those of the shipped one.

    Args:
        keys: What is tuned.
        max_shared: Bytes of shared memory that a program may have.
        which_fit: Which of some tiles can run; the shipped one is always tried.
        times_of: Seconds of each tile.
        found: Called for each key at once, so that a run that is stopped loses nothing.
    """
    for key in keys:
        shipped, *others = candidates(key, max_shared)
        kept = [shipped, *(tile for tile, good in zip(others, which_fit(key, others), strict=True) if good)]
        times = times_of(key, kept)
        best = choose(times, shipped)
        found(key, best, times[best], times[shipped])


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


def target_of_this_machine() -> str:
    """The static report's name of this machine's GPU."""
    properties = torch.cuda.get_device_properties(0)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def main() -> None:
    from benchmarks.static_report.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    names = sorted({key.kernel for key in KEYS})
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--capacities", nargs="+", type=int, help="ranks' capacities; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--output", type=Path, default=PATH, help="default: kernels/_measured.py")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU: tiles can be compiled without one (python -m benchmarks.static), not timed")
    if (target := target_of_this_machine()) not in TARGETS:
        parser.error(f"the GPU is a {target}, of which benchmarks/static_report/targets.py says nothing: add it there")
    keys = [k for k in KEYS if k.kernel in arguments.kernels and k.capacity in (arguments.capacities or [k.capacity])]
    device, began, entries = torch.cuda.get_device_name(), time.monotonic(), dict(_configs.measured())
    about = report.environment(torch.device("cuda"), [])
    where = f"{about['date'][:10]}, commit {about['commit']}, torch {about['versions']['torch']}, "
    where += f"triton {about['versions']['triton']}, {static_cases.SHAPE}"
    if not arguments.output.exists():
        arguments.output.write_text(PATH.read_text())

    def found(key: Key, tile: Tile, seconds: float, before: float) -> None:
        if tile == key.shipped:
            entries.pop(key.entry, None)
        else:
            entries[key.entry] = tile
        write(arguments.output, device, entries, where)
        gain = f"{1e3 * seconds:.4f} ms, shipped {1e3 * before:.4f} ms"
        print(f"{time.monotonic() - began:4.0f} s  {key}: {astuple(tile)}, {gain}", flush=True)

    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

        def which_fit(key: Key, tiles: list[Tile]) -> list[bool]:
            return list(pool.map(partial(fits, key, target), tiles, chunksize=4))

        tune(keys, TARGETS[target].max_block_shared, which_fit, partial(measure, target=target), found)


if __name__ == "__main__":
    main()
