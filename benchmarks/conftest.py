"""Options of the benchmark suite, the measurements that its entries share, and the report at the end."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.floors import Machine
from benchmarks.race import DTYPES, Case, Outcome, Outcomes, Row, measure
from benchmarks.timing import probe


class Bench:
    """One session on one device: measures a case when its first entry is asked for, and remembers all of them."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.measured: dict[Case, Outcomes] = {}
        self.machine = cache(self._machine)
        self.machines: list[Machine] = []

    def _machine(self, dtype: torch.dtype) -> Machine:
        self.machines.append(probe(self.device, dtype, DTYPES[dtype]))
        return self.machines[-1]

    def outcome(self, case: Case, mode: str, provider: str) -> Outcome:
        if case not in self.measured:
            try:
                self.measured[case] = measure(case, self.device, self.machine(case.dtype))
            except Exception as error:  # for each entry of the case, without trying it again
                self.measured[case] = {(mode, name): error for mode in case.modes for name in case.contenders()}
        return self.measured[case][mode, provider]

    def rows(self) -> list[Row]:
        outcomes = (outcome for case in self.measured.values() for outcome in case.values())
        return [outcome for outcome in outcomes if isinstance(outcome, Row)]


BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lrlora benchmarks")
    group.addoption("--quick", action="store_true", help="one tiny case, to see that the suite runs")
    group.addoption(
        "--results",
        type=Path,
        metavar="PATH",
        help="write the measurements to this .json file, or into this folder under the device's name",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results", None)
    if path is not None and path.suffix == ".json" and not path.parent.is_dir():
        raise pytest.UsageError(f"--results {path}: there is no folder {path.parent}; make it, or name another")
    config.stash[BENCH] = Bench()


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    return pytestconfig.stash[BENCH]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if not (rows := bench.rows()):
        return
    about = report.environment(bench.device, bench.machines)
    terminalreporter.section("overhead over the base layer")
    terminalreporter.write_line(report.table(rows, about))
    if (path := config.getoption("--results", None)) is not None:
        terminalreporter.write_line(f"\nwrote {report.write(path, rows, about)}")
