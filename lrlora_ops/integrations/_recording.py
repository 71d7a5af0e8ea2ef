"""The history of a run under Hugging Face's Trainer, for ``lrlora report``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from lrlora_ops.adapters import Adapters

TEXT = "training data"  # what shares of routing are of


class Recorder:
    """Writes ``history.jsonl`` into the trainer's output directory, in the first process of several.

    The device is read for 200 steps at most, evenly over the run, and for the first and the last one. A disk that
    refuses the file ends the record with a warning, and not the run.

    Args:
        adapters: Whose ranks are recorded.
        args: The trainer's.
        state: At the start, or where the run resumes.
    """

    def __init__(self, adapters: Adapters, args: TrainingArguments, state: TrainerState) -> None:
        from lrlora_ops.finetune.history import History

        self.adapters, self.args = adapters, args
        self._history: Any = None  # a History, as long as the disk takes it
        self._directory = Path(args.output_dir or ".")
        with self._writing():
            self._history = History(self._directory, adapters, state.max_steps, state.global_step)
        self._begun = False
        self._losses: list[Tensor] = []  # since the last line
        self._held_out: list[Mapping[str, float]] = []  # not written yet
        experts = {name: module.table for name, module in adapters.modules.items() if module.table.num_experts > 1}
        self._routed = {name: torch.zeros_like(table.row_counts) for name, table in experts.items()}

    def on_batch(self, inputs: Mapping[str, Any]) -> None:
        """Before a forward pass: what the run begins with is written before the first one."""
        if not self._begun:
            ids = inputs.get("input_ids")
            self._begin(ids.shape if isinstance(ids, Tensor) and ids.dim() == 2 else None)

    def before_step(self, loss_scale: Tensor | None) -> None:
        """Right before ``Adapters.step``, which clears what backward has gathered and then moves the ranks."""
        if not self._begun:  # nobody could show the batches
            self._begin(None)
        if self._history is None:
            return
        self._history.on_backward(1.0 if loss_scale is None else loss_scale)
        for name, counts in self._routed.items():
            counts += self.adapters.modules[name].table.row_counts

    def after_step(self, loss: Tensor | None) -> None:
        """Right after it, with the step's loss, if that is known."""
        if self._history is None:
            return
        self._losses += [] if loss is None else [loss]
        if not self._history.is_due:
            return self._history.pass_step()
        with self._writing():
            self._history.on_step(float(torch.stack(self._losses).mean()) if self._losses else math.nan)
        self._losses = []

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """After an evaluation: its losses, by the prefix of their names, such as "eval", or "eval_code"."""
        losses = {name.removesuffix("_loss"): loss for name, loss in metrics.items() if name.endswith("_loss")}
        self._held_out += [losses] if losses else []
        if self._begun:
            self._write_held_out()

    def _write_held_out(self) -> None:
        with self._writing():
            while self._history is not None and self._held_out:
                self._history.on_evaluate(self._held_out.pop(0))

    def end(self) -> None:
        """The run came to its end."""
        if self._history is None or not self._begun:
            return
        device = self.adapters.parameters()[0].device
        shares = {name: (counts / counts.sum().clamp(min=1)).tolist() for name, counts in self._routed.items()}
        with self._writing():
            self._history.end(
                bits={},
                routing={TEXT: shares} if shares else {},
                parameters=sum(parameter.numel() for parameter in self.adapters.parameters()),
                held=None,
                gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            )

    def _begin(self, batch: Sequence[int] | None) -> None:
        from lrlora_ops.finetune.history import traced_layers
        from lrlora_ops.finetune.machine import describe

        self._begun = True
        if self._history is None:
            return
        rows, seq_len = batch or (0, 0)
        sizes = traced_layers(self.adapters, seq_len, rows) if batch else {"no_layers": "no batch had input_ids [B, T]"}
        with self._writing():
            self._history.begin(
                name=", ".join(dict.fromkeys(type(method).__name__ for method, _ in self.adapters.methods)),
                machine=describe(self.adapters.parameters()[0].device),
                seed=self.args.seed,
                tokens=rows * seq_len * self.args.gradient_accumulation_steps * self.args.world_size or None,
                before={},
                **sizes,
            )
        self._write_held_out()  # of before the first step

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._history = None
            warnings.warn(
                f"{self._directory} does not take the history of this run ({error.strerror}), which goes on without "
                "it: lrlora report will show no more than what is there",
                stacklevel=2,
            )
