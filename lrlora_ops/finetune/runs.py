"""Runs as ``lrlora finetune``, ``lrlora demo`` and the trainer's callback leave them: their histories, read back."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrlora_ops._checkpoint import STATE_FILE
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.plan import Layer

FILE = "history.jsonl"
VERSION = 2
_WANTED = "the --output of lrlora finetune or demo, or the output directory of a trainer with adapters.callback()"


@dataclass(frozen=True)
class Run:
    """One history; docs/command.md has the fields of its lines.

    Attributes:
        directory: Of the run.
        label: Its name, with the directory if another run that is shown has the same name.
        start: The first line.
        steps: The lines of its steps, in order; a line may be of several steps, up to the one that it names.
        held_out: The lines of a trainer's evaluations, in order.
        end: The last line's results; None for a run that has not ended.
    """

    directory: Path
    label: str
    start: dict[str, Any]
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def seconds(self) -> float:
        """Of training."""
        return sum(step["seconds"] for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Of training; None if the run has no step yet, or does not know its tokens."""
        if not (self.steps and self.seconds and self.start["tokens"]):
            return None
        return (self.steps[-1]["step"] - self.first_step) * self.start["tokens"] / self.seconds

    @property
    def first_step(self) -> int:
        """How many steps had been made before the history began: not 0 if the rest of it is elsewhere."""
        return self.start.get("first_step", 0)

    @property
    def num_experts(self) -> dict[str, int]:
        """Per adapter, in the order of the ranks; 1 for a linear layer."""
        return {name: settings["num_experts"] for name, settings in self.start["adapters"].items()}

    @property
    def max_rank(self) -> int:
        """The most that the methods could have given to a layer or an expert."""
        return max(settings["max_rank"] for settings in self.start["adapters"].values())

    @property
    def snapshots(self) -> list[dict[str, Any]]:
        """The lines with ranks, and what was before the first step."""
        first = {key: own for key, own in self.start.items() if key in ("ranks", "stable_ranks")}
        return [{"step": self.first_step} | first, *(step for step in self.steps if "ranks" in step)]

    @property
    def ranks(self) -> list[int]:
        """The last that are known, of every layer, or of every expert in it."""
        return self.snapshots[-1]["ranks"]

    @property
    def stable_ranks(self) -> list[float | None]:
        """As ``ranks``, of what a ``SincUpdate`` learned; None elsewhere."""
        return self.snapshots[-1].get("stable_ranks") or [None] * len(self.ranks)

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Their names by what is shown of them: the "rank", or the "stable rank" of what a ``SincUpdate`` learns."""
        first = self.by_adapter(self.start.get("stable_ranks") or [None] * len(self.ranks))
        stable = [name for name, ranks in first.items() if None not in ranks]
        return {"rank": [name for name in first if name not in stable], "stable rank": stable}

    @property
    def layers(self) -> list[Layer]:
        """Of a training step, in the order of the model's forward; none if the run could not say."""
        return [
            Layer(**layer | {"projections": tuple(map(tuple, layer["projections"]))})
            for layer in self.start.get("layers", [])
        ]

    @property
    def method(self) -> str:
        """With those settings that are numbers."""
        written = []
        for entry in self.start["methods"]:
            numbers = {key: value for key, value in entry["settings"].items() if isinstance(value, (int, float))}
            written.append(f"{entry['method']}({', '.join(f'{key}={value:.4g}' for key, value in numbers.items())})")
        return ", ".join(written)

    def by_adapter(self, values: Sequence[Any]) -> dict[str, list[Any]]:
        """Values of every layer, or of every expert in it, adapter by adapter."""
        parts, first = {}, 0
        for name, experts in self.num_experts.items():
            parts[name] = list(values[first : first + experts])
            first += experts
        return parts


def read_runs(directories: Iterable[Path]) -> list[Run]:
    """The runs in these directories, or below them, each once; those of one directory by the time of their start.

    Raises:
        CommandError: A directory holds no run, or one that cannot be read.
    """
    runs: dict[Path, Run] = {}
    for directory in directories:
        found = [read_run(path) for path in _histories(directory)]
        for run in sorted(found, key=lambda run: run.start["started"]):
            runs.setdefault(run.directory.resolve(), run)
    return _labelled(list(runs.values()))


def _histories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory: give {_WANTED}")
    own = directory / FILE
    if found := [own] if own.is_file() else sorted(directory.rglob(FILE)):
        return found
    if (directory / STATE_FILE).is_file():
        raise CommandError(
            f"{directory} holds adapters, but no {FILE}, which is written where a run begins: give {_WANTED}, or see "
            "the adapters with lrlora doctor"
        )
    raise CommandError(f"{directory} is no run: it holds no {FILE}; give {_WANTED}")


def read_run(path: Path) -> Run:
    """Read a history.

    Raises:
        CommandError: It is of a newer version, or damaged; an incomplete last line is what a run leaves that was cut
            off, and is left out.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what has no newline was cut off
    start: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    end = None
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if "history" in line:
                _check_version(path, line)
                start, end = start or _checked(line), None
                first = line["first_step"]
                steps, held_out = ([own for own in kept if own["step"] <= first] for kept in (steps, held_out))
            elif "end" in line:
                end = line["end"]
            else:
                (held_out if "held_out" in line else steps).append({"step": int(line["step"]), **line})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(
                f"{path} is damaged in line {number} ({error!r}): restore it, or leave this run out"
            ) from error
    if start is None:
        raise CommandError(f"{path} has no first line that says what ran: leave this run out, or train it again")
    return Run(path.parent, start["name"], start, steps, held_out, end)


def _check_version(path: Path, line: dict[str, Any]) -> None:
    if line["history"] > VERSION:
        raise CommandError(
            f"{path} has format version {line['history']}, and this lrlora reads {VERSION}: update lrlora_ops"
        )


def _checked(start: dict[str, Any]) -> dict[str, Any]:
    """Raises KeyError or ValueError if it is not what a run begins with."""
    experts = sum(settings["num_experts"] for settings in start["adapters"].values())
    if len(start["ranks"]) != experts or not experts:
        raise ValueError(f"{len(start['ranks'])} ranks of {experts} layers and experts")
    if len(start.get("stable_ranks", start["ranks"])) != experts:
        raise ValueError(f"{len(start['stable_ranks'])} stable ranks of {experts} layers and experts")
    for key in ("name", "machine", "started", "steps", "tokens", "before", "methods"):
        start[key]
    return start


def _labelled(runs: list[Run]) -> list[Run]:
    """With the directory, as far as it tells them apart, where several have one name."""
    names = Counter(run.label for run in runs)
    directories = [run.directory.resolve() for run in runs]
    common = os.path.commonpath(directories) if len(runs) > 1 else ""
    return [
        replace(run, label=f"{run.label} · {directory.relative_to(common)}") if names[run.label] > 1 else run
        for run, directory in zip(runs, directories, strict=True)
    ]
