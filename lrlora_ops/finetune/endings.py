"""Runs that end before their time: what is saved, and what to try, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lrlora_ops.finetune import checkpoints
from lrlora_ops.finetune.errors import CommandError, DiskFull, Diverged, OutOfMemory, Stopped, disk_is_full
from lrlora_ops.finetune.trainer import Trainer

ENDINGS = (KeyboardInterrupt, torch.OutOfMemoryError, OSError, Diverged)


def explained(error: BaseException, run: Path, trainer: Trainer, save: Callable[[], object]) -> CommandError:
    """Save what can be saved; the error to raise instead, which tells the rest.

    Args:
        error: One of ``ENDINGS``.
        run: Directory of the run.
        trainer: As the error left it.
        save: Writes a checkpoint.
    """
    if isinstance(error, KeyboardInterrupt | torch.OutOfMemoryError) and trainer.whole:
        try:
            save()
        except OSError as unwritten:
            error = unwritten
    newest = checkpoints.newest(run)
    saved = f"{newest} is saved" if newest else "nothing is saved"
    again = f"lrlora finetune --resume {run}"
    if isinstance(error, KeyboardInterrupt):
        return Stopped(f"stopped at step {trainer.steps}; {saved}{f', go on with: {again}' if newest else ''}")
    if isinstance(error, torch.OutOfMemoryError):
        go_on = f"go on where there is more with: {again}, or " if newest else ""
        return OutOfMemory(
            f"the GPU's memory is full at step {trainer.steps}; {saved}: {go_on}start anew with a lower --batch-size "
            "or --seq-len, or with --dtype bfloat16"
        )
    if isinstance(error, Diverged):
        return Diverged(f"{error}, in a new run with --lr; {saved}{', an adapter from before it' if newest else ''}")
    then = f"go on with: {again}" if newest else "start anew with another --output"
    if disk_is_full(error):
        return DiskFull(f"the disk of {run} is full at step {trainer.steps}; {saved}: make room, then {then}")
    return CommandError(f"{run} cannot be written ({error}); {saved}: put that right, then {then}")
