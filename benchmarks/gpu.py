"""``python -m benchmarks.gpu`` (``make gpu``): all that a GPU has to say about this library, within ten minutes.

In this order: parity of the ops and kernels at real sizes; the kernels of the benchmarks compiled, in parallel; the
machine's own rates and the benchmarks; the goals and docs/performance.md. A part that overruns is stopped, a failure
is recorded, and the rest goes on; what was measured is on disk after every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import docs, report
from benchmarks.race import CONTEXT_LOST
from benchmarks.results_file import FOLDER, Results, file_for

ROOT = Path(__file__).parents[1]
# Shares of the minutes that parity and compilation may take, and the seconds that are kept for the report.
_PARITY_SHARE, _WARM_SHARE, _REPORT_SECONDS = 0.45, 0.2, 15
_STOPPED = -1
_NEEDED = ("pytest", "pytest_benchmark", "hypothesis")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>PASSED|FAILED|ERROR|SKIPPED) (?P<test>tests/.+?)"
    r"|(?P<test2>tests/.+?) (?P<last>PASSED|FAILED|ERROR|SKIPPED)\b.*)\s*$"
)
_COLLECTED = re.compile(r"(?:/ |collected |\[)(\d+) (?:selected|items?\]|items?$)")


@dataclass
class Parity:
    """What pytest's lines have said so far."""

    total: int = 0
    outcomes: dict[str, str] = field(default_factory=dict)

    def read(self, line: str) -> None:
        """Take in a line of pytest's verbose output, of one process or of several."""
        if found := _OUTCOME.match(line):
            self.outcomes[found["test"] or found["test2"]] = found["first"] or found["last"]
        elif found := _COLLECTED.search(line):
            self.total = int(found[1])

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)

    def record(self, seconds: float) -> dict[str, object]:
        """What the results file says of it."""
        return {
            "passed": self.count("PASSED"),
            "failed": [test for test, outcome in self.outcomes.items() if outcome in ("FAILED", "ERROR")],
            "skipped": [test for test, outcome in self.outcomes.items() if outcome == "SKIPPED"],
            "not_run": max(self.total - len(self.outcomes), 0),
            "seconds": round(seconds),
        }


def run(command: Sequence[str], seconds: float, read: Callable[[str], None]) -> int:
    """Run a command, hand on its lines, and stop it with all its processes when the time is up.

    Returns:
        Its exit code, or ``_STOPPED``.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        list(command),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: [read(line.rstrip("\n")) for line in process.stdout or ()], daemon=True)
    reader.start()
    try:
        code = process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        code = _STOPPED
    finally:
        _stop(process)  # what it left running too
    reader.join(5)
    return code


def _stop(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue


class Run:
    """One run of all parts, with its clock and its results file."""

    def __init__(self, results: Path, minutes: float, more: Sequence[str], jobs: int) -> None:
        self.began, self.seconds, self.more, self.jobs = time.monotonic(), 60 * minutes, list(more), jobs
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.results = Results(file_for(results, report.device_name(device)))
        self.about = report.environment(device, [])

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:4.0f} s  {line}", flush=True)

    def parity(self, marker: str = "gpu") -> None:
        """The tests that are marked so; a log beside the results has all that they print."""
        marked = [path for path in ROOT.glob("tests/test_*.py") if f"mark.{marker}" in path.read_text()]
        files = sorted(str(path.relative_to(ROOT)) for path in marked)
        # A file that cannot be imported here must not keep the others from running.
        command = [*PYTEST, "-v", "--tb=short", "--continue-on-collection-errors", "-m", marker, *files]
        if importlib.util.find_spec("xdist"):  # compiles in parallel
            command += ["-n", str(self.jobs), "--dist", "worksteal"]
        assert self.results.path is not None
        parity, began, log = Parity(), time.monotonic(), self.results.path.with_suffix(".parity.log")
        with log.open("w") as lines:

            def read(line: str) -> None:
                lines.write(line + "\n")
                parity.read(line)
                if line.startswith(("FAILED", "ERROR")):
                    print("      ", line[:300], flush=True)

            self.say(f"parity: {len(files)} files of tests, log in {log}")
            code = run(command, _PARITY_SHARE * self.seconds, read)
            time.sleep(0.1)
        record = parity.record(time.monotonic() - began)
        self.results.content["parity"] = {**record, "stopped": code == _STOPPED, "exit_code": code}
        self.results.write(self.about)
        counts = ", ".join(f"{parity.count(o.upper())} {o}" for o in ("passed", "failed", "error", "skipped"))
        stopped = ", stopped: its time was up" if code == _STOPPED else ""
        self.say(f"parity: {counts}, {record['not_run']} not run{stopped}")

    def warm(self) -> None:
        """Compile what the benchmarks launch."""
        command = [sys.executable, "-m", "benchmarks.warm", "--jobs", str(self.jobs)]
        command += [option for option in self.more if option == "--quick"]
        run(command, min(_WARM_SHARE * self.seconds, self.left()), lambda line: print("      ", line[:300], flush=True))
        self.say("compiled")

    def benchmarks(self) -> None:
        """The suite; again, without who did it, where somebody made the GPU unusable for the process."""
        code = CONTEXT_LOST
        while code == CONTEXT_LOST and (left := self.left() - _REPORT_SECONDS) > 0:
            command = [*PYTEST, "benchmarks/", "--benchmark-only", "-q"]
            command += ["--results", str(self.results.path), "--resume", "--minutes", f"{left / 60:.2f}", *self.more]
            code = run(command, left, _progress)
            self.say(f"benchmarks: exit code {code}" if code != _STOPPED else "benchmarks: stopped, the time was up")

    def report(self) -> bool:
        """Print the results and write the tables of docs/; whether nothing has failed."""
        assert self.results.path is not None
        self.results = Results(self.results.path, resume=True)
        content = self.results.content
        if content.get("machines"):
            print(report.text(content))
        if self.results.path.parent == FOLDER:
            docs.update()
        failed = [entry for entry in content["left_out"] if entry["kind"] == "failed"]
        parity = content.get("parity", {})
        good = bool(content["rows"]) and not failed and parity.get("exit_code") == 0
        self.say(f"results in {self.results.path}; {'nothing failed' if good else 'NOT all went well, see above'}")
        return good


def _progress(line: str) -> None:
    """Of the suite's own lines those that say what was measured."""
    if re.match(r"^ *\d+ s  |^(FAILED|ERROR|E  )", line):
        print("      ", line[:300], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; default 9.5")
    parser.add_argument("--results", type=Path, default=FOLDER, help="a .json file, or the folder of one per device")
    parser.add_argument("--jobs", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)), help="processes")
    parser.add_argument("--skip", nargs="+", default=[], choices=["parity", "warm", "benchmarks"], help="leave out")
    arguments, more = parser.parse_known_args()
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        names = " ".join(missing).replace("_", "-")
        parser.error(f"{sys.executable} has no {', '.join(missing)}: {sys.executable} -m pip install {names}")
    this = Run(arguments.results.resolve(), arguments.minutes, more, arguments.jobs)
    this.results.write(this.about)
    for name in ("parity", "warm", "benchmarks"):
        if name not in arguments.skip:
            getattr(this, name)()
    sys.exit(0 if this.report() else 1)


if __name__ == "__main__":
    main()
