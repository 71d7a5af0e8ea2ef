"""The file of a run's results, written after every case: a run that is stopped loses nothing, and can be taken up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.providers import Unavailable
from benchmarks.race import Outcomes, Row

FOLDER = Path(__file__).parent / "results"


class Results:
    """What was measured so far, in memory and, with a path, in a file.

    ``content`` has where and when it was (``report.environment``), ``rows`` (``Row.record``), ``left_out`` (who was
    not timed in which case, and why), ``done`` (ids of finished cases) and ``blamed`` (by case, the providers that took
    the GPU away from their process, with the reason).
    """

    def __init__(self, path: Path | None = None, resume: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = {"rows": [], "left_out": [], "done": [], "blamed": {}}
        if resume and path is not None and path.exists():
            self.content |= json.loads(path.read_text())

    def add(self, case: str, layer: str, outcomes: Outcomes, about: Mapping[str, Any]) -> None:
        """Take in a finished case, and write all."""
        for (mode, provider), outcome in outcomes.items():
            if isinstance(outcome, Row):
                self.content["rows"].append(outcome.record())
            else:
                self.content["left_out"].append(
                    {"case": case, "layer": layer, "mode": mode, "provider": provider, **reason_of(outcome)}
                )
        self.content["done"].append(case)
        self.write(about)

    def blame(self, case: str, provider: str, reason: str, about: Mapping[str, Any]) -> None:
        """Remember who must not take part when the case is tried again, and write all."""
        self.content["blamed"].setdefault(case, {})[provider] = reason
        self.write(about)

    def write(self, about: Mapping[str, Any]) -> None:
        """Write all, in one step: a file that is half written is never seen."""
        self.content = {**self.content, **about}
        if self.path is not None:
            partial = self.path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            partial.replace(self.path)


def reason_of(error: Exception) -> dict[str, str]:
    """Why somebody was not timed, in one line, and whether that is a defect or somebody who is not here."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unavailable):
        return {"kind": "not here", "reason": text}
    return {"kind": "failed", "reason": f"{type(error).__name__}: {text}"}


def file_for(path: Path, device: str) -> Path:
    """The path itself if it is a .json file, else the file of that device in the folder, which is made."""
    if path.suffix == ".json":
        return path
    path.mkdir(parents=True, exist_ok=True)
    return path / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
