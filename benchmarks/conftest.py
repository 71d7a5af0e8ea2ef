"""Options of the benchmark suite, the session that its entries share, and the report at the end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.race import CONTEXT_LOST, Case, ContextLost, Outcome
from benchmarks.results_file import Results, file_for
from benchmarks.session import Bench


class Suite(Bench):
    """The session that pytest runs, which ends where the GPU is lost."""

    def outcome(self, case: Case, mode: str, provider: str) -> Outcome:
        try:
            return super().outcome(case, mode, provider)
        except ContextLost as lost:
            message = f"{case}: {lost.args[0]} made the GPU unusable; --resume goes on without it"
            pytest.exit(message, CONTEXT_LOST)


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

    config.stash[BENCH] = Suite(results, config.getoption("--minutes", None), write_line)


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
