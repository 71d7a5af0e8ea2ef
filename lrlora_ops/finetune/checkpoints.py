"""Checkpoints of a run, ``checkpoint-STEP`` in its directory: each appears whole, and the newest one is kept."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch

from lrlora_ops import Adapters
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.trainer import Trainer

TRAINING_FILE = "training.pt"


def newest(run: Path) -> Path | None:
    """The checkpoint of the most steps, if there is one."""
    return max(run.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save(run: Path, adapters: Adapters, trainer: Trainer, facts: dict[str, Any]) -> Path:
    """Write a checkpoint from which ``load`` continues bit for bit on a CPU, and delete the older ones.

    Args:
        run: Directory of the run.
        adapters: Saved with ``Adapters.save``, so that the checkpoint is a directory of adapters as well.
        trainer: Between two steps.
        facts: What else the run has to know; numbers, strings, dicts.

    Raises:
        OSError: It cannot be written; the older ones are still there.
    """
    target = run / f"checkpoint-{trainer.steps}"
    if target.exists():
        return target
    draft = run / f".{target.name}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        adapters.save(draft)
        state = io.BytesIO()  # torch.save says of a full disk only that a position was unexpected
        torch.save({"trainer": trainer.state_dict(), "random": _random_state(trainer.device), "facts": facts}, state)
        (draft / TRAINING_FILE).write_bytes(state.getbuffer())
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    remove(run, but=target)
    return target


def read(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` wrote beside the adapters.

    Raises:
        CommandError: It cannot be read.
    """
    try:
        return torch.load(checkpoint / TRAINING_FILE, weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = f"{type(error).__name__} in {TRAINING_FILE}"
        raise CommandError(f"{checkpoint} is damaged ({reason}): start a new run with another --output") from error


def load(checkpoint: Path, state: dict[str, Any], adapters: Adapters, trainer: Trainer) -> None:
    """Continue from ``save``, with what ``read`` returned.

    Raises:
        CommandError: The checkpoint is damaged, or of other adapters.
    """
    try:
        adapters.load(checkpoint)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    trainer.load_state_dict(state["trainer"])
    torch.set_rng_state(state["random"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], trainer.device)


def remove(run: Path, but: Path | None = None) -> None:
    """Delete the checkpoints, but one."""
    for path in run.glob("checkpoint-[0-9]*"):
        if path != but:
            shutil.rmtree(path)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
