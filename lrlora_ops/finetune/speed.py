"""How fast this machine trains, with how many threads, and how many steps that leaves in the time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrlora_ops.finetune.trainer import batch_loss

OPTIMIZER_SHARE = 1.15  # a training step takes this much longer than its forward and backward pass


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_per_step(
    model: nn.Module, batch: Tensor, balance: float = 0.0, steps: int = 10, limit: float = 4.0
) -> float:
    """Median time of a forward and backward pass; gradients are dropped, nothing is trained.

    Takes ``steps`` passes after a first one that is not counted, but no more after ``limit`` seconds.
    """
    times: list[float] = []
    while len(times) < 2 or (len(times) <= steps and sum(times) < limit):
        start = time.perf_counter()
        batch_loss(model, batch, balance).backward()
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return statistics.median(times[1:])


def choose_threads(model: nn.Module, batch: Tensor, balance: float = 0.0) -> dict[int, float]:
    """Time 1, 2, 4, ... threads and set the fastest: on busy cores two can be many times slower than one.

    Returns:
        Seconds per step by number of threads; the last one is the first that did not help.
    """
    seconds: dict[int, float] = {}
    threads = 1
    while threads <= usable_cores():
        torch.set_num_threads(threads)
        seconds[threads] = seconds_per_step(model, batch, balance)
        if seconds[threads] > min(seconds.values()):
            break
        threads *= 2
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    return seconds


@dataclass(frozen=True)
class Costs:
    """Seconds: of a pretraining step, of a fine-tuning step in all arms together, of all measuring."""

    pretraining: float
    fine_tuning: float
    measuring: float

    def scaled(self, factor: float) -> Costs:
        """The costs on a machine that turns out to be slower by ``factor``."""
        return Costs(factor * self.pretraining, factor * self.fine_tuning, factor * self.measuring)

    def total(self, pretraining: int, fine_tuning: int) -> float:
        """Seconds for so many steps, measuring included."""
        return pretraining * self.pretraining + fine_tuning * self.fine_tuning + self.measuring

    def fit(self, pretraining: int, fine_tuning: int, available: float, least: int = 10) -> tuple[int, int]:
        """Cut both numbers of steps by the same factor until they fit ``available`` seconds, to ``least`` at most."""
        training = self.total(pretraining, fine_tuning) - self.measuring
        factor = min(1.0, (available - self.measuring) / training)

        def cut(steps: int) -> int:
            return min(steps, max(least, int(factor * steps)))

        return cut(pretraining), cut(fine_tuning)


class Pace:
    """Pretraining by the clock: a machine can turn out to be slower than its costs were, or become so.

    Attributes:
        steps: How many were made.
        slowness: How many times longer than predicted one took.
    """

    def __init__(self, costs: Costs, wanted: tuple[int, int], deadline: float) -> None:
        """
        Args:
            costs: As predicted.
            wanted: Steps of pretraining and of fine-tuning without a limit.
            deadline: By ``time.perf_counter``, when the whole run is to have ended.
        """
        self.costs, self.wanted, self.deadline = costs, wanted, deadline
        self.steps, self.slowness = 0, 1.0

    def while_it_fits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, until another step would not leave the rest of the run its share of the time."""
        start = time.perf_counter()
        for batch in batches:
            if self.steps and self.steps >= self._fitting(start):
                break
            yield batch
            self.steps += 1
            self.slowness = (time.perf_counter() - start) / (self.steps * self.costs.pretraining)

    def _fitting(self, start: float) -> int:
        return self.costs.scaled(self.slowness).fit(*self.wanted, self.deadline - start)[0]
