"""What a run leaves for ``lrlora report``: ``history.jsonl``, a JSON object per line, written while it trains.

The first line says what runs, steps add lines, and the last one says what it came to; docs/command.md has the fields. A
run that was cut off lacks its last line, and one that was resumed has another first line in its middle.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrlora_ops import Adapters
from lrlora_ops._trace import trace
from lrlora_ops.finetune.ranks import StableRanks, known, rank_list, spread, stable_rank_list
from lrlora_ops.finetune.runs import FILE, VERSION
from lrlora_ops.rank_table import RankTable

SNAPSHOTS = 200  # of ranks and sensitivities, at most, however long the run


class History:
    """Writes the file of one run; every line is complete on disk before the next step."""

    def __init__(self, directory: Path, adapters: Adapters, steps: int, first_step: int = 0) -> None:
        """
        Args:
            directory: Of the run; made if need be.
            adapters: Whose ranks are recorded.
            steps: Of the whole run.
            first_step: How many were made before: the lines are added to what the directory has, not put in its place.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.adapters = directory / FILE, adapters
        self.steps, self.step = steps, first_step
        self._stride = -(-steps // SNAPSHOTS)
        self._sensitivities: list[float | None] = []
        self._stable: StableRanks | None = None
        if not first_step:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self._drop_unfinished_line()

    def begin(self, **fields: Any) -> None:
        """Write the first line: these fields, and what is known of the adapters."""
        ranks = self._read_ranks()
        self._write(
            {
                "history": VERSION,
                **fields,
                "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "steps": self.steps,
                "first_step": self.step,
                "methods": [{"method": type(m).__name__, "settings": asdict(m)} for m, _ in self.adapters.methods],  # type: ignore[call-overload]
                "adapters": {name: module.settings() for name, module in self.adapters.modules.items()},
                **ranks,
            }
        )
        self._last = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether the step that is being made is one whose ranks and sensitivities are recorded."""
        step = self.step + 1
        return step == 1 or step % self._stride == 0 or step == self.steps

    def on_backward(self, loss_scale: float | Tensor = 1.0) -> None:
        """Between backward and ``Adapters.step``, which clears the sensitivities: read them if they are due."""
        if self.is_due:
            self._sensitivities = sensitivities(self.adapters, loss_scale)

    def pass_step(self) -> None:
        """After a step that gets no line of its own: the next line is of the steps since the last one."""
        self.step += 1

    def on_step(self, loss: float) -> None:
        """After a step: add a line, with the mean loss since the last one."""
        now, due = time.perf_counter(), self.is_due
        self.step += 1
        line: dict[str, Any] = {"step": self.step, "loss": _number(loss), "seconds": _number(now - self._last)}
        if due:
            line |= self._read_ranks() | {"sensitivity": self._sensitivities}
        self._write(line)
        self._last = now

    def on_evaluate(self, losses: Mapping[str, float]) -> None:
        """After an evaluation: add a line with the held-out losses, by name."""
        self._write({"step": self.step, "held_out": {name: _number(loss) for name, loss in losses.items()}})

    def _read_ranks(self) -> dict[str, list[Any]]:
        self._stable = stable_rank_list(self.adapters)
        return {"ranks": rank_list(self.adapters)} | ({} if self._stable is None else {"stable_ranks": self._stable})

    def shown_ranks(self) -> str:
        """For a line on the terminal: the ranks of now, or the stable ranks last recorded if there are no others."""
        ranks = rank_list(self.adapters)
        stable = self._stable or [None] * len(ranks)
        live = [rank for rank, own in zip(ranks, stable, strict=True) if own is None]
        return f"ranks {spread(live)}" if live else f"stable ranks {spread(known(stable))}"

    def end(self, **results: Any) -> None:
        """Write the last line."""
        self._write({"end": results})

    def _drop_unfinished_line(self) -> None:
        """What a process left that was killed as it wrote, or the next line would go on from there."""
        whole = self.path.read_bytes()
        with self.path.open("rb+") as file:
            file.truncate(whole.rfind(b"\n") + 1)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def sensitivities(adapters: Adapters, loss_scale: float | Tensor = 1.0) -> list[float | None]:
    """The sum of ``|dL/dm|`` over the live components of every layer, or of every expert in it, as ``ranks`` has them.

    What is at stake with the components of a group, to first order, in the unit of the loss. None if it is not finite,
    or not known, as of the components of a ``SincUpdate``.
    """
    unknown = torch.tensor(math.nan)
    groups = [
        _group_sensitivity(own.table).cpu() if own.reports_sensitivity else unknown.expand(own.table.num_experts)
        for own in adapters.modules.values()
    ]
    return [_number(value / float(loss_scale), 4) for value in torch.cat(groups).tolist()]


def _group_sensitivity(table: RankTable) -> Tensor:
    """``[E]``; projections that share a component add up."""
    if not table.pool_size:
        return torch.zeros(table.num_experts)
    c = (table.sensitivity * table.gate.detach()).view(table.num_projections, -1).sum(0).abs()
    live = torch.arange(table.max_rank, device=c.device) < table.train_ranks[:, None]
    return torch.where(live, c[table.components.long()], 0.0).sum(1)


def traced_layers(adapters: Adapters, seq_len: int, rows: int) -> dict[str, Any]:
    """What ``lrlora_ops.plan`` computes costs from: ``{"layers": ...}`` of the adapted layers in a step.

    Returns:
        ``{"no_layers": reason}`` for a model that cannot be made anew on the meta device.
    """
    model: Any = adapters.model
    try:
        with torch.device("meta"):
            meta: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
        layers = trace(meta, {name: meta.get_submodule(name) for name in adapters.modules}, seq_len).layers
    except Exception as error:  # a model of one's own, a quantised one: many kinds
        return {"no_layers": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    return {"layers": [asdict(x) | {"tokens": rows * x.tokens, "rows": rows * x.rows} for x in layers]}


def _number(value: float, digits: int = 6) -> float | None:
    """With so many digits; None, which is null in JSON, if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
