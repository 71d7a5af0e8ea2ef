"""The entries of pytest-benchmark: one per case, mode and provider.

The providers of a case are timed in turn, round by round (see ``timing.interleave``), when the case's first entry
runs; pytest-benchmark is then given each provider's rounds by a clock that replays them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from benchmarks.providers import Unavailable
from benchmarks.race import Case


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


def parametrize(metafunc: pytest.Metafunc, cases: Sequence[Case]) -> None:
    """One entry per case, mode and provider."""
    entries = [
        pytest.param(case, mode, provider, id=f"{case.id}-{mode}-{provider}".replace(" ", "-"))
        for case in cases
        for mode in case.modes
        for provider in case.contenders()
    ]
    metafunc.parametrize(("case", "mode", "provider"), entries)


def replay(case: Case, mode: str, provider: str, bench: Any, benchmark: Any) -> None:
    """Give pytest-benchmark the rounds of an entry; skip who is not installed, fail who is wrong."""
    outcome = bench.outcome(case, mode, provider)
    if isinstance(outcome, Unavailable):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    benchmark.group = f"{case}, {mode}"
    benchmark.extra_info.update(outcome.record())
    clock.durations = iter(outcome.samples_s)
    benchmark.pedantic(clock.advance, rounds=len(outcome.samples_s))
