"""What was routed to each expert, counted by autograd: so it is right under accumulation and checkpointing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _CountDemand(torch.autograd.Function):
    """The identity on y; ``demand`` gets as its gradient what the batch has routed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, demand: Tensor, group_offsets: Tensor, row_weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(group_offsets, row_weights)
        ctx.dtype = demand.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group_offsets, row_weights = ctx.saved_tensors
        counts = group_offsets.diff()
        if row_weights is None:
            return dy, torch.stack([counts, counts]).to(ctx.dtype), None, None
        sums = F.pad(row_weights.double().cumsum(0), (1, 0))[group_offsets.long()].diff()
        return dy, torch.stack([counts, sums]).to(ctx.dtype), None, None


def count_demand(y: Tensor, demand: Tensor | None, group_offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y, whose backward pass adds to ``demand.grad`` the experts' rows and the sums of their weights.

    Args:
        y: Any result of the batch.
        demand: fp32 ``[2, E]`` (``RankTable.demand``), or None to count nothing.
        group_offsets: int32 ``[E + 1]``.
        row_weights: ``[L]``, the routing weight of each sorted row; None for ones.
    """
    return y if demand is None else _CountDemand.apply(y, demand, group_offsets, row_weights)
