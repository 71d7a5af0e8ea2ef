"""Models and tokenizers from a Hugging Face directory on this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lrlora_ops.finetune.errors import CommandError


def quiet_transformers() -> None:
    """No warnings and no bars of its own: the command shows its own progress."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_pretrained(directory: Path, device: torch.device, dtype: str = "auto") -> tuple[Any, Any]:
    """The causal language model and the tokenizer in ``directory``.

    Args:
        directory: As ``save_pretrained`` writes it.
        device: Where the model goes.
        dtype: ``float32``, ``bfloat16``, or ``auto`` for the checkpoint's own.

    Raises:
        CommandError: There is no such directory, it holds something else, or the model is in fp16.
    """
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory: give one that holds a Hugging Face model, downloaded before")
    if not (directory / "config.json").is_file():
        raise CommandError(f"{directory} has no config.json: give a directory that save_pretrained wrote")
    quiet_transformers()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a directory that is damaged or of another kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(
            f"{directory} cannot be loaded as a causal language model: {reason[0]}; give another --model"
        ) from error
    if model.dtype == torch.float16:
        raise CommandError("the model is in float16, which trains only with loss scaling: add --dtype bfloat16")
    return model.to(device), tokenizer
