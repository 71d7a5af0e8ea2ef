"""Times of several steps that compete: taken in turn, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch

from lrlora_ops.tuning.timers import Timer

Name = TypeVar("Name", bound=Hashable)
# The fewest and the most rounds; a GPU's clock is steadier, and its time is short.
ROUNDS = {"cpu": (5, 100), "cuda": (10, 60)}


def interleave(
    timers: Mapping[Name, Timer], device: torch.device, budget_s: float
) -> tuple[dict[Name, list[float]], dict[Name, Exception]]:
    """Seconds that each step takes: lists of equal length, whose entries of the same index were taken together.

    A round takes one sample of each, in random order, and there are as many rounds as the budget allows, within
    ``ROUNDS``. The first round is not counted: on a CPU first calls allocate and compile.

    Returns:
        The samples by name, and what went wrong with those that failed on the way, who have no samples.
    """
    order, shuffle = list(timers), random.Random(0).shuffle
    samples: dict[Name, list[float]] = {name: [] for name in timers}
    failed: dict[Name, Exception] = {}

    def take(name: Name) -> None:
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
