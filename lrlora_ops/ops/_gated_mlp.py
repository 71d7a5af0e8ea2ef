"""The experts of a layer whose gated activation the kernels know, as one autograd function of few launches.

Forward saves x, ``[gate, up]`` and both U; the activation's output is recomputed. Backward makes the sums over rows
before it goes on to x, so that what they read is freed by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.ops._backends import primitives
from lrlora_ops.ops._backward import differentiable_once

# A few times the programs that a large GPU runs at once: a long expert's share of the sums over rows is no long tail.
_COUNTERS = 1024


class GatedMLPFunction(torch.autograd.Function):
    """x ``[T, H]`` -> ``[T, H]``: gather, first projection, activation, second projection, weighted sum per token.

    ``demand`` gets as its gradient what the batch has routed: the rows whose weight has a gradient. That of a routing
    weight is ``<y_i, dy_t> = <h_i, dL/dh_i>``, before it is weighted, so the second projection has no bias here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        route_weights: Tensor,
        up_A: Tensor,
        up_B: Tensor,
        up_gate: Tensor | None,
        down_A: Tensor,
        down_B: Tensor,
        down_gate: Tensor | None,
        demand: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        ranks: Tensor,
        components: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        row_order: Tensor,
        row_position: Tensor,
        activation: str,
        up_transposed: bool,
        down_transposed: bool,
        scaling: float,
        backend: str,
    ) -> Tensor:
        ops, low_rank, transposed = primitives(backend, x), (ranks, scaling), (up_transposed, down_transposed)
        up_u = ops.shrink(x, up_A, ranks, components.shape[1], components, offsets, tokens)
        gate_up = ops.grouped_gemm(
            x, up_weight, up_bias, transposed[0], offsets, tokens, up_u, up_B, *low_rank, up_gate, components
        )
        h, down_u = ops.gated_shrink(gate_up, down_A, activation, ranks, components, offsets)
        y = ops.grouped_gemm(
            h, down_weight, None, transposed[1], offsets, None, down_u, down_B, *low_rank, down_gate, components
        )
        ctx.save_for_backward(
            *(x, route_weights, up_A, up_B, up_gate, down_A, down_B, down_gate, up_weight, down_weight),
            *(ranks, components, offsets, tokens, row_order, row_position, gate_up, up_u, down_u),
        )
        ctx.activation, ctx.transposed, ctx.scaling, ctx.backend = activation, transposed, scaling, backend
        return ops.combine(y, row_position, route_weights, offsets)

    @staticmethod
    @differentiable_once("moe_lora_mlp")
    def backward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        route_weights: Tensor,
        up_A: Tensor,
        up_B: Tensor,
        up_gate: Tensor | None,
        down_A: Tensor,
        down_B: Tensor,
        down_gate: Tensor | None,
        up_weight: Tensor,
        down_weight: Tensor,
        ranks: Tensor,
        components: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        row_order: Tensor,
        row_position: Tensor,
        gate_up: Tensor,
        up_u: Tensor,
        down_u: Tensor,
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        ops, low_rank, transposed = primitives(ctx.backend, x), (ranks, ctx.scaling), ctx.transposed
        dy = dy.to(x.dtype)
        down_v = ops.shrink(dy, down_B, ranks, components.shape[1], components, offsets, tokens)
        dh = ops.grouped_gemm(
            dy, down_weight, None, not transposed[1], offsets, tokens, down_v, down_A, *low_rank, down_gate, components
        )
        d_gate_up, h, up_v, d_route = ops.gated_shrink_backward(
            dh, gate_up, up_B, route_weights, row_order, ctx.activation, ranks, components, offsets
        )
        del dh
        owners = (components, offsets)
        up_grads: Sequence[Tensor | None] = [None] * 3
        down_grads, demand = up_grads, None
        if any(needs[2:9]):
            up_grads, down_grads, demand, counters = _zeros((up_A, up_B), (down_A, down_B), offsets)
        if any(needs[5:9]):
            ops.adapter_gradients(
                *(*down_grads, demand if needs[8] else None, counters[0], down_u, down_v, h, dy, *low_rank),
                *(down_gate, *owners, None, tokens, route_weights, row_order, d_route),
            )
        if any(needs[2:5]):
            ops.adapter_gradients(
                *(*up_grads, None, counters[1], up_u, up_v, x, d_gate_up, *low_rank, up_gate, *owners), x_index=tokens
            )
        del h
        d_x = None
        if needs[0]:
            d_rows = ops.grouped_gemm(
                d_gate_up, up_weight, None, not transposed[0], offsets, None, up_v, up_A, *low_rank, up_gate, components
            )
            d_x = ops.combine(d_rows, row_position, None, offsets)
        grads = (d_x, d_route, *up_grads, *down_grads, demand)
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=False)), *[None] * 14


def _zeros(
    up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], group_offsets: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]:
    """Zeros for the gradients of A, B and gate of both projections, of demand ``[2, E]``, and counters: one launch."""
    fp32 = torch.float32
    wanted = [(t.shape, t.dtype) for t in (*up, *down)]
    wanted[2:2] = [(up[0].shape[:1], fp32)]
    wanted += [(down[0].shape[:1], fp32), (torch.Size((2, group_offsets.shape[0] - 1)), fp32)]
    wanted += [(torch.Size((2, _COUNTERS)), torch.int32)]
    # In pieces of 16 bytes, which the kernels load and store at a time.
    sizes = [-(-math.prod(shape) * dtype.itemsize // 16) * 4 for shape, dtype in wanted]
    pieces = torch.zeros(sum(sizes), dtype=fp32, device=group_offsets.device).split(sizes)
    zeros = [_viewed(piece, *one) for piece, one in zip(pieces, wanted, strict=True)]
    return zeros[:3], zeros[3:6], zeros[6], zeros[7]


def _viewed(piece: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    values = piece if dtype == piece.dtype else piece.view(dtype)
    return values[: math.prod(shape)].view(shape)
