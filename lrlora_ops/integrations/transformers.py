"""The Hugging Face Trainer's callback: the methods' step at the right moment."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora_ops.adapters import Adapters


class AdaptersCallback(TrainerCallback):
    """Calls ``Adapters.step()`` after clipping and before the optimizer, once per optimizer step.

    Args:
        adapters: What ``apply_lora`` returned for the model that is trained.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Methods that were not told the length of the run learn it from the trainer."""
        for policy in self.adapters.policies:
            if policy.total_steps is None:
                policy.total_steps = state.max_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gradients are complete and clipped here."""
        self.adapters.step()
