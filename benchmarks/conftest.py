"""Options of the benchmark suite, the measurements that its entries share, and the report at the end."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.floors import Machine
from benchmarks.providers import FORWARD_BACKWARD, Unavailable
from benchmarks.race import CONTEXT_LOST, DTYPES, Case, ContextLost, Outcome, Outcomes, Row, measure
from benchmarks.results_file import Results, file_for
from benchmarks.timing import probe


class Bench:
    """One session on one device: measures a case when its first entry is asked for, and remembers all of them."""

    def __init__(self, results: Results, minutes: float | None, write_line: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.began, self.seconds = time.monotonic(), None if minutes is None else 60 * minutes
        self.measured: dict[Case, Outcomes] = {}
        self.machine = cache(self._machine)
        self.machines: list[Machine] = []
        self.results, self.write_line, self.longest = results, write_line, 0.0

    def _machine(self, dtype: torch.dtype) -> Machine:
        found = [Machine(**m) for m in self.results.content.get("machines", []) if m["name"] == DTYPES[dtype]]
        self.machines += found or [probe(self.device, dtype, DTYPES[dtype])]
        self.results.write(self.about())
        return self.machines[-1]

    def about(self) -> dict[str, Any]:
        return report.environment(self.device, self.machines)

    def time_left(self) -> float:
        """Seconds of ``--minutes``."""
        return float("inf") if self.seconds is None else self.began + self.seconds - time.monotonic()

    def outcome(self, case: Case, mode: str, provider: str) -> Outcome:
        if case not in self.measured:
            self.measured[case] = self._measure(case)
        return self.measured[case][mode, provider]

    def _measure(self, case: Case) -> Outcomes:
        everybody = [(mode, name) for mode in case.modes for name in case.contenders()]
        if case.id in self.results.content["done"]:
            return dict.fromkeys(everybody, Unavailable("measured before, see --results"))
        if self.time_left() < self.longest:
            return dict.fromkeys(everybody, Unavailable("no time was left of --minutes"))
        began = time.monotonic()
        try:
            without = self.results.content["blamed"].get(case.id)
            outcomes = measure(case, self.device, self.machine(case.dtype), time_left=self.time_left, without=without)
        except ContextLost as lost:
            self.results.blame(case.id, lost.args[0], f"it made the GPU unusable: {lost.__cause__}", self.about())
            pytest.exit(f"{case}: {lost.args[0]} made the GPU unusable; --resume goes on without it", CONTEXT_LOST)
        except Exception as error:  # for each entry of the case, without trying it again
            outcomes = dict.fromkeys(everybody, error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.longest = max(self.longest, time.monotonic() - began)
        self.results.add(case.id, case.layer, outcomes, self.about())
        self.write_line(f"{time.monotonic() - self.began:4.0f} s  {case}: {_progress(outcomes)}")
        return outcomes


def _progress(outcomes: Outcomes) -> str:
    found = []
    for (mode, name), outcome in outcomes.items():
        if isinstance(outcome, Row) and mode == FORWARD_BACKWARD:
            time = outcome.overhead or outcome.time
            found.append(f"{name} {'+' if outcome.overhead else ''}{time.median:.3g}")
        elif not isinstance(outcome, (Row, Unavailable)):
            found.append(f"{name} FAILED")
    return ", ".join(found) + " ms"


BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lrlora benchmarks")
    group.addoption("--quick", action="store_true", help="one tiny case, to see that the suite runs")
    group.addoption(
        "--results",
        type=Path,
        metavar="PATH",
        help="write the measurements to this .json file, or into this folder under the device's name, after every case",
    )
    group.addoption("--resume", action="store_true", help="keep what the file of --results has, and measure the rest")
    group.addoption("--minutes", type=float, help="begin no case for which the time is too short; default: no limit")


def pytest_configure(config: pytest.Config) -> None:
    path, resume = config.getoption("--results", None), config.getoption("--resume", False)
    if path is not None and path.suffix == ".json" and not path.parent.is_dir():
        raise pytest.UsageError(f"--results {path}: there is no folder {path.parent}; make it, or name another")
    if resume and path is None:
        raise pytest.UsageError("--resume needs --results: the file to take up")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(None if path is None else file_for(path, report.device_name(device)), resume)
    before = results.content.get("commit", report.commit()).removesuffix("-dirty")
    if before != report.commit().removesuffix("-dirty"):
        raise pytest.UsageError(f"--resume: {results.path} was measured at commit {before}; leave --resume out")

    def write_line(line: str) -> None:
        reporter, capture = map(config.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            if reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(line)

    config.stash[BENCH] = Bench(results, config.getoption("--minutes", None), write_line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a goal is about comes first: the time may not do for all."""

    def priority(item: pytest.Item) -> int:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return case.priority if case is not None else 0

    items.sort(key=priority)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    return pytestconfig.stash[BENCH]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if not bench.results.content["rows"]:
        return
    terminalreporter.section("overhead over the base layer")
    terminalreporter.write_line(report.text(bench.results.content))
    if bench.results.path is not None:
        terminalreporter.write_line(f"\nwrote {bench.results.path}")
