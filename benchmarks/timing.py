"""Times of several steps that compete: taken in turn, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.floors import Machine

Step = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 5, 100
_GPU_ROUNDS, _GPU_REPLAY_MS = 3, 20
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Spread:
    """The median of some samples, with the quantiles at 20% and 80%."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        quantiles = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), quantiles[0], quantiles[-1])


def differences(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """What each sample takes beyond the base in the same round: a drift of the machine's speed cancels."""
    return [sample - other for sample, other in zip(samples, base, strict=True)]


def interleave(steps: dict[str, Step], device: torch.device, budget_s: float) -> dict[str, list[float]]:
    """Seconds that each step takes: lists of equal length, whose entries of the same index were taken together.

    On a CPU a round runs each step once, in random order, and there are as many rounds as the budget allows, within
    ``MIN_ROUNDS`` and ``MAX_ROUNDS``. On a GPU a round replays a CUDA graph of each step, host time left out.
    """
    sample = _replayed if device.type == "cuda" else _called
    order, shuffle = list(steps), random.Random(0).shuffle
    began = time.perf_counter()
    for step in steps.values():  # first calls allocate and compile
        step()
    rounds = _GPU_ROUNDS
    if device.type != "cuda":
        rounds = int(budget_s / max(time.perf_counter() - began, 1e-9))
        rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name] += sample(steps[name])
    return samples


def _called(step: Step) -> list[float]:
    began = time.perf_counter()
    result = step()
    elapsed = time.perf_counter() - began
    del result  # the memory goes back when the clock has stopped, for all alike
    return [elapsed]


def _replayed(step: Step) -> list[float]:
    from triton.testing import do_bench_cudagraph

    return [ms / 1e3 for ms in do_bench_cudagraph(step, rep=_GPU_REPLAY_MS, return_mode="all")]


def probe(device: torch.device, dtype: torch.dtype, name: str) -> Machine:
    """What this machine reaches: the rates of a large copy and of a large matrix product, the best of several."""
    source = torch.ones(_COPY_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = _MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleave({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}, device, budget_s=1)
    return Machine(name, 2 * source.numel() / min(times["copy"]), 2 * size**3 / min(times["matmul"]))
