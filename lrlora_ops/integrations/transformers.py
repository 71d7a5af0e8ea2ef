"""The Hugging Face Trainer's callback: the methods' step at the right moment, and their state in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora_ops.adapters import Adapters


class AdaptersCallback(TrainerCallback):
    """Calls ``Adapters.step()`` after clipping and before the optimizer, once per optimizer step.

    Saves the adapters into each of the trainer's checkpoints and, when a run resumes, loads them from there.

    Args:
        adapters: What ``apply_lora`` returned for the model that is trained.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Methods that were not told the length of the run learn it from the trainer.

        Raises:
            ValueError, FileNotFoundError: The run resumes, but its checkpoint has no state of these adapters.
        """
        if state.global_step and not all(policy.frozen for policy in self.adapters.policies):
            self.adapters.load(_checkpoint(args, state))
        for policy in self.adapters.policies:
            if policy.total_steps is None:
                policy.total_steps = state.max_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gradients are complete and clipped here."""
        self.adapters.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The trainer's own files lack what a method must remember."""
        if state.is_world_process_zero:
            self.adapters.save(_checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
