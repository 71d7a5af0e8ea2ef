"""Autocast in the public ops: operands are cast once, as ``F.linear`` would, and nothing after that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_CAST_BY_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def autocast_operands(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The operands of the base product in the dtype that ``F.linear`` would compute in."""
    operands = [x, *others]
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None or t.dtype not in _CAST_BY_AUTOCAST else t.to(dtype) for t in operands]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations run in the dtypes of their operands."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
