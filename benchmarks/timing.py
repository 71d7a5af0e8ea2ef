"""What is made of the samples of a race, and the machine's own rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.floors import Machine
from lrlora_ops.tuning.rounds import interleave
from lrlora_ops.tuning.timers import timer_for

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
