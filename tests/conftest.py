"""What every test run has: interpreted kernels where there is no GPU, one CPU thread, GPU tests skipped by name."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

NO_GPU = "no GPU: needs an NVIDIA or AMD device"

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined

# A test's outcome follows from the code alone: not from the seed, nor from how busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes a minute starts first, or the other workers wait for it at the end.
    items.sort(key=lambda item: item.path.name not in ("test_static.py", "test_packaging.py", "test_demo.py"))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Slow tests stay with the others of their file: two workers would start the file's processes twice."""
    if "slow" not in config.option.markexpr.replace("not slow", ""):
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = sum(NO_GPU in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} GPU tests were skipped ({NO_GPU}); make gpu runs them")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    # Parallel workers share the GPU's memory, and what one keeps for later is missing elsewhere.
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new uninitialized tensors with NaN, so that an output that a kernel leaves unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
