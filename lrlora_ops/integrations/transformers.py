"""The callback for the Hugging Face Trainer and what is built on it, such as TRL's SFTTrainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations._recording import Recorder


class AdaptersCallback(TrainerCallback):
    """Calls ``Adapters.step()`` once per optimizer step, adds the ranks to the logs and the state to the checkpoints.

    A step that fp16's loss scaler skips does not count, and the scale is taken out of the statistics. Clipping is not:
    a method sees the gradient of the loss, as the published code does, whatever is left of it for the optimizer.

    Args:
        adapters: What ``apply_lora`` returned for the model that is trained.
        history: Whether to write ``history.jsonl``, which ``lrlora report`` draws, into the trainer's output directory.
    """

    def __init__(self, adapters: Adapters, history: bool = True) -> None:
        self.adapters, self.history = adapters, history
        self._loss_scale: torch.Tensor | None = None
        self._loss: _StepLoss | None = None
        self._recorder: Recorder | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Methods that were not told the length of the run learn it from the trainer, also when it resumes.

        Raises:
            ValueError, FileNotFoundError: The run resumes, but its checkpoint has no state of these adapters.
        """
        trainer, resumed = self._find_trainer()
        if state.global_step:
            self.adapters.load(resumed or _checkpoint(args, state))
        for policy, (method, _names) in zip(self.adapters.policies, self.adapters.methods, strict=True):
            if getattr(method, "total_steps", None) is None and not policy.frozen:
                policy.total_steps = state.max_steps
        recorded = self.history and state.is_world_process_zero
        self._recorder = Recorder(self.adapters, args, state) if recorded else None
        self._release_loss()  # of a run that was interrupted
        if trainer is not None and (self._recorder or self._needs_loss()):
            self._loss = _StepLoss(trainer, self._recorder)

    def _needs_loss(self) -> bool:
        return any(policy.needs_loss for policy in self.adapters.policies)

    def _find_trainer(self) -> tuple[Trainer | None, Path | None]:
        """Take the first place among the trainer's callbacks; returns it, and the checkpoint that it resumes from.

        Loggers come before what a user adds and write what is in the logs by then. The trainer tells its callbacks
        neither their order nor the checkpoint, which may be anywhere; both are in the frame that raises the event.
        """
        frame = inspect.currentframe()
        while frame and not isinstance(frame.f_locals.get("self"), Trainer):
            frame = frame.f_back
        if frame is None:
            return None, None
        trainer: Trainer = frame.f_locals["self"]
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:  # and not part of another one
            callbacks.remove(self)
            callbacks.insert(0, self)
        resumed = frame.f_locals.get("resume_from_checkpoint")
        return trainer, None if resumed is None else Path(resumed)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The methods' state goes with the weights of the best checkpoint, which the trainer has just loaded."""
        self._release_loss()
        if self._recorder:
            self._recorder.end()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.adapters.load(state.best_model_checkpoint)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer's step updates the loss scale, so remember the one that the gradients have."""
        self._loss_scale = _loss_scale(args, kwargs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The statistics are still there, and only now is it known whether the step was skipped: then the scale falls.

        (accelerate's ``optimizer_step_was_skipped`` is False for fused optimizers, which skip on the device.)
        """
        before, after = self._loss_scale, _loss_scale(args, kwargs)
        loss = None if self._loss is None else self._loss.take()
        if self._recorder:
            self._recorder.before_step(before)
        if before is None or after is None:
            self.adapters.step(loss=loss)
        else:  # fp16 alone waits for the device here
            self.adapters.step(loss=loss, loss_scale=before, skipped=bool(after < before))
        if self._recorder:
            self._recorder.after_step(loss)
        elif not self._needs_loss():
            self._release_loss()

    def _release_loss(self) -> None:
        if self._loss is not None:
            self._loss.release()
            self._loss = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """The ranks go wherever the loss goes."""
        if logs is not None and "loss" in logs:
            figures = self.adapters.metrics()
            logs.update(figures)
            for row in state.log_history[-1:]:  # a copy of the logs, made before anybody saw them
                row.update(figures)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """What was held out stands in the history beside the training loss."""
        if self._recorder and metrics:
            self._recorder.on_evaluate(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The trainer's own files lack what a method must remember. The first process writes it."""
        self.adapters.save(_checkpoint(args, state))


class _StepLoss:
    """The loss of an optimizer step, which a trainer hands to no callback.

    It is the sum of what ``training_step`` returns for the micro-batches: whatever the trainer divides by, that is what
    the gradients are of. Of several processes each has its own; their mean is the loss, as it is of the gradients.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder | None) -> None:
        self._trainer, self._training_step, self._recorder = trainer, trainer.training_step, recorder
        self._sum: torch.Tensor | None = None
        trainer.training_step = self._watched

    def _watched(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._recorder:
            self._recorder.on_batch(inputs)
        loss = self._training_step(model, inputs, *args, **kwargs)
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
        return loss

    def take(self) -> torch.Tensor | None:
        """The loss of the step that is over, skipped or not."""
        loss, self._sum = self._sum, None
        return loss

    def release(self) -> None:
        """Give the trainer its own method back, unless somebody else has replaced it since."""
        if self._trainer.training_step == self._watched:
            self._trainer.training_step = self._training_step


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _loss_scale(args: TrainingArguments, event: dict[str, Any]) -> torch.Tensor | None:
    """The factor of the loss, on the device; None where there is none, as in bf16."""
    scaler = getattr(event.get("optimizer"), "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=args.device))
