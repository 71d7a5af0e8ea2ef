"""The search for one kernel's tile: candidates are compiled in parallel, what fits takes turns, the fastest is kept.

The shipped tile is the first candidate, and stays unless another one is faster by more than ``MARGIN``.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from lrlora_ops.kernels._capture import LAUNCH_ERRORS, capture, this_gpu
from lrlora_ops.kernels._configs import Tile, pinned
from lrlora_ops.kernels._user_tiles import Key
from lrlora_ops.tuning.calls import Call
from lrlora_ops.tuning.candidates import candidates
from lrlora_ops.tuning.rounds import interleave
from lrlora_ops.tuning.timers import Timer, timer_for

MARGIN = 0.02
_SECONDS = 1.0  # of rounds, for each call
_TOLERANCES = {2: 1e-2, 4: 1e-4}  # relative, by bytes of an element


class Judge(Protocol):
    """What is asked about tiles: a GPU, or what a test says in its place.

    Attributes:
        max_shared: Bytes of shared memory that a program may have.
    """

    max_shared: int

    def fitting(self, key: Key, calls: Sequence[Call], tiles: Sequence[Tile]) -> list[bool]:
        """Of each tile, whether the calls compile with it and fit."""

    def seconds(self, key: Key, calls: Sequence[Call], tiles: Sequence[Tile]) -> dict[Tile, float]:
        """What the calls take with each tile, infinity for a tile that fails; the first is known to run."""


@dataclass(frozen=True)
class Found:
    """The tile for a key, with its seconds, those of the shipped tile, and how many were tried of how many."""

    tile: Tile
    seconds: float
    shipped_seconds: float
    fitting: int
    tried: int


def search(key: Key, shipped: Tile, calls: Sequence[Call], judge: Judge) -> Found:
    """The fastest tile of a key, by the sum over some calls."""
    _, *others = every = candidates(key, shipped, judge.max_shared)
    fits = judge.fitting(key, calls, others)
    kept = [shipped, *(tile for tile, good in zip(others, fits, strict=True) if good)]
    times = judge.seconds(key, calls, kept)
    best = choose(times, shipped)
    return Found(best, times[best], times[shipped], len(kept), len(every))


def choose(times: Mapping[Tile, float], shipped: Tile) -> Tile:
    """The fastest tile, but the shipped one unless it is beaten by more than ``MARGIN``."""
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - MARGIN) * times[shipped] else shipped


class Gpu:
    """This machine's GPU, and processes that compile for it: Triton's cache brings their code here."""

    def __init__(self, jobs: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.target, self.max_shared = this_gpu(self.device.index)
        self.processes = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Gpu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processes.shutdown(cancel_futures=True)

    def fitting(self, key: Key, calls: Sequence[Call], tiles: Sequence[Tile]) -> list[bool]:
        """Of each tile, whether the calls compile with it and fit into the shared memory."""
        shapes = [call.on_meta() for call in calls]
        return list(self.processes.map(partial(fits, key, shapes, self.target, self.max_shared), tiles, chunksize=4))

    def seconds(self, key: Key, calls: Sequence[Call], tiles: Sequence[Tile]) -> dict[Tile, float]:
        """The medians of interleaved rounds, summed over the calls; infinity for a tile that fails or computes else.

        Raises:
            Exception: The first tile fails.
        """
        total = dict.fromkeys(tiles, 0.0)
        for call in calls:
            with pinned(key, tiles[0]):
                expected = call.results()
            pool = torch.cuda.graph_pool_handle()
            timers: dict[Tile, Timer] = {}
            for tile in tiles:
                try:
                    with pinned(key, tile):
                        if agree(call.results(), expected):
                            timers[tile] = timer_for(call, self.device, pool)
                except LAUNCH_ERRORS:
                    if tile == tiles[0]:
                        raise
            samples, failed = interleave(timers, self.device, _SECONDS)
            if tiles[0] in failed:
                raise failed[tiles[0]]
            for tile in tiles:
                total[tile] += statistics.median(samples[tile]) if tile in samples else float("inf")
        return total


def agree(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two tiles compute the same, but for the order of sums: nothing is timed that does not."""
    return all(
        float((result.float() - other).norm()) <= _TOLERANCES[other.element_size()] * float(other.float().norm())
        for result, other in zip(results, expected, strict=True)
    )


def fits(key: Key, calls: Sequence[Call], target: Any, max_shared: int, tile: Tile) -> bool:
    """Whether the calls compile with a tile and fit. For a process of its own, see ``capture``; tensors may be meta."""
    try:
        with pinned(key, tile):
            launches = [launch for call in calls for launch in capture(target, call)]
    except Exception:  # what does not compile does not fit
        return False
    return all(launch.compiled.metadata.shared <= max_shared for launch in launches)
