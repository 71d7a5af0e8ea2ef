"""``lrlora export``: an adapter directory, for other libraries."""

from __future__ import annotations

from pathlib import Path

import torch

from lrlora_ops import load_adapter
from lrlora_ops.finetune.errors import CheckFailed, CommandError
from lrlora_ops.finetune.pretrained import load_pretrained


def export_adapter(model: Path, adapter: Path, output: Path, format: str, dtype: str) -> None:
    """Write the adapter in another format, and compare what was written with what it does here.

    Raises:
        CommandError: The model or the adapter cannot be read, or does not fit the format.
        CheckFailed: What was written computes something else.
    """
    base, tokenizer = load_pretrained(model, torch.device("cpu"), dtype)
    try:
        load_adapter(base, adapter).export(output, format)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    except RuntimeError as error:
        raise CheckFailed(str(error)) from error
    if format == "merged":
        tokenizer.save_pretrained(output)
