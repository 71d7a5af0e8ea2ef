"""One entry per case, mode and provider. Parity comes first: what disagrees with the oracle fails and is not timed.

The providers of a case are timed in turn, round by round (see ``timing.interleave``), when the case's first entry
runs; pytest-benchmark is then given each provider's rounds by a clock that replays them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.dense import Case, cases
from benchmarks.providers import MODES, Unavailable


class ReplayClock:
    """A timer that stands still, but for the next of the given durations at each ``advance``."""

    def __init__(self) -> None:
        self.time = 0.0
        self.durations: Iterator[float] = iter(())

    def now(self) -> float:
        return self.time

    def advance(self) -> None:
        self.time += next(self.durations)


clock = ReplayClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = [
        pytest.param(case, mode, provider, id=f"{case.id}-{mode}-{provider}".replace(" ", "-"))
        for case in cases(device, metafunc.config.getoption("--quick", False))
        for mode in MODES
        for provider in case.contenders()
    ]
    metafunc.parametrize(("case", "mode", "provider"), entries)


@pytest.mark.benchmark(timer=clock.now)
def test_dense(case: Case, mode: str, provider: str, bench: Any, benchmark: Any) -> None:
    outcome = bench.outcome(case, mode, provider)
    if isinstance(outcome, Unavailable):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    benchmark.group = f"{case}, {mode}"
    benchmark.extra_info.update(outcome.record())
    clock.durations = iter(outcome.samples_s)
    benchmark.pedantic(clock.advance, rounds=len(outcome.samples_s))
