"""What was routed to each expert, counted by autograd: so it is right under accumulation and checkpointing.

A row counts if the loss depends on it: if its gradient is not zero. Padding has none, for it is masked in attention and
has no label; who pads, masks, packs or flattens need not tell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _CountDemand(torch.autograd.Function):
    """The identity on y; ``demand`` gets as its gradient what the batch has routed."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        demand: Tensor,
        group_offsets: Tensor,
        row_weights: Tensor | None,
        source: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(group_offsets, row_weights, source)
        ctx.dtype = demand.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group_offsets, row_weights, source = ctx.saved_tensors
        counts = dy.any(1) if source is None else dy.any(1)[source]  # NaN is a gradient
        weights = counts if row_weights is None else torch.where(counts, row_weights, counts)
        sums = F.pad(torch.stack([counts, weights]).cumsum(1, dtype=torch.float64), (1, 0))
        return dy, sums[:, group_offsets].diff().to(ctx.dtype), None, None, None


def count_demand(
    y: Tensor,
    demand: Tensor | None,
    group_offsets: Tensor,
    row_weights: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """y, whose backward pass adds to ``demand.grad`` the number of the experts' rows that have a gradient, and the sums
    of their weights.

    Args:
        y: ``[T, N]``, a result of the batch.
        demand: fp32 ``[2, E]`` (``RankTable.demand``), or None to count nothing.
        group_offsets: int32 ``[E + 1]``.
        row_weights: ``[L]``, the routing weight of each sorted row; None for ones.
        source: ``[L]``, the row of y that each sorted row is a part of; None if y has the sorted rows.
    """
    return y if demand is None else _CountDemand.apply(y, demand, group_offsets, row_weights, source)
