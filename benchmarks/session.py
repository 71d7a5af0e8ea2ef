"""One session of the suite on one device: cases are measured as they are asked for, and written after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks import report
from benchmarks.floors import Machine
from benchmarks.providers import FORWARD_BACKWARD, Unavailable
from benchmarks.race import DTYPES, Case, ContextLost, Outcome, Outcomes, Row, measure
from benchmarks.results_file import Results
from benchmarks.timing import probe


class Bench:
    """One session on one device: measures a case when its first entry is asked for, and remembers all of them."""

    def __init__(
        self,
        results: Results,
        minutes: float | None,
        write_line: Callable[[str], object],
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        return self.outcomes(case)[mode, provider]

    def outcomes(self, case: Case) -> Outcomes:
        """Of everybody in the case.

        Raises:
            ContextLost: A provider has made the GPU unusable for this process; the results say which.
        """
        if case not in self.measured:
            self.measured[case] = self._measure(case)
        return self.measured[case]

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
            raise
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
