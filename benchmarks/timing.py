"""Times of several steps that compete: taken in turn, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.floors import Machine
from benchmarks.timers import Timer, timer_for

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
# The fewest and the most rounds; a GPU's clock is steadier, and its time is short.
ROUNDS = {"cpu": (5, 100), "cuda": (10, 60)}


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


def interleave(
    timers: Mapping[str, Timer], device: torch.device, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds that each step takes: lists of equal length, whose entries of the same index were taken together.

    A round takes one sample of each, in random order, and there are as many rounds as the budget allows, within
    ``ROUNDS``. The first round is not counted: on a CPU first calls allocate and compile.

    Returns:
        The samples by name, and what went wrong with those that failed on the way, who have no samples.
    """
    order, shuffle = list(timers), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in timers}
    failed: dict[str, Exception] = {}

    def take(name: str) -> None:
        try:
            samples[name].append(timers[name].sample())
        except Exception as error:
            failed[name] = error
            order.remove(name)
            del samples[name]

    began = time.perf_counter()
    for name in list(order):
        take(name)
    least, most = ROUNDS[device.type]
    rounds = min(max(int(budget_s / max(time.perf_counter() - began, 1e-9)), least), most)
    for _ in range(rounds):
        shuffle(order)
        for name in list(order):
            take(name)
    return {name: taken[1:] for name, taken in samples.items()}, failed


def probe(device: torch.device, dtype: torch.dtype, name: str) -> Machine:
    """What this machine reaches: the rates of a large copy and of a large matrix product, the best of several."""
    source = torch.randint(256, (_COPY_BYTES[device.type] // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = _MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    steps = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    times, failed = interleave({name: timer_for(step, device, pool) for name, step in steps.items()}, device, 1.0)
    for error in failed.values():
        raise error
    return Machine(name, 2 * source.numel() / min(times["copy"]), 2 * size**3 / min(times["matmul"]))
