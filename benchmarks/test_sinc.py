"""A layer moved by a learned function. Parity comes first: what disagrees with the oracle fails and is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.entries import clock, parametrize, replay
from benchmarks.sinc import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parametrize(metafunc, cases(device, metafunc.config.getoption("--quick", False)))


@pytest.mark.benchmark(timer=clock.now)
def test_sinc(case: Case, mode: str, provider: str, bench: Any, benchmark: Any) -> None:
    replay(case, mode, provider, bench, benchmark)
