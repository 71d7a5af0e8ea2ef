"""Parameters that FSDP2 has divided among processes: DTensors, of which a process holds a part of the rows.

Within a module's forward pass they are whole, and plain tensors. Rank tables and statistics are never divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is divided among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor itself or, as a collective of the processes that share it, all of it in each of them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def divided(tensor: Tensor, like: Any) -> Tensor:
    """What this process holds of a tensor that every process has, if it is divided as ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def zero_rows(parameter: Tensor, rows: Tensor) -> None:
    """Zeros in these rows, bool ``[R]``, of ``[R, N]``; without a wait for the device."""
    parameter.masked_fill_(divided(rows[:, None], parameter), 0.0)


def require_whole(parameters: Iterable[nn.Parameter], what: str) -> None:
    """Refuse what needs all of the parameters in one process.

    Raises:
        ValueError: One is divided.
    """
    if any(is_sharded(parameter) for parameter in parameters):
        raise ValueError(
            f"the parameters are divided among processes (FSDP), and {what} needs them whole: do it before "
            "fully_shard, or save the adapters, load them in one process, and do it there"
        )
