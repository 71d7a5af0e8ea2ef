"""What a run runs on: device, versions, memory."""

from __future__ import annotations

import platform
import resource
import sys

import torch
import transformers

import lrlora_ops
from lrlora_ops.finetune.errors import CommandError


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one.

    Raises:
        CommandError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        have = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise CommandError(f"--device {name} is not usable here; choose auto or one of: {have}") from None
    return device


def describe(device: torch.device) -> str:
    """Versions and device in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"lrlora_ops {lrlora_ops.__version__} · Python {platform.python_version()} · torch {torch.__version__} · "
        f"transformers {transformers.__version__} · {device.type} ({name})"
    )


def peak_memory(device: torch.device) -> str:
    """The most memory that the process has used so far."""
    # Linux counts in KiB, macOS in bytes.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"peak memory {resident / 1e6:,.0f} MB"
    if device.type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB"
    return text
