"""The function behind sinc_lora_linear and moe_sinc_mlp: frozen weights moved by a learned function of ``B^T A``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrlora_ops import eager
from lrlora_ops.ops._backends import primitives
from lrlora_ops.ops._backward import differentiable_once
from lrlora_ops.ops.grouped_lora_linear import row_gradients


class SincFunction(torch.autograd.Function):
    """Rows ``[L, K] -> [L, N]``, sorted by expert; without ``group_offsets`` one matrix has them all.

    ``gathers`` and ``route_weights`` are as for ``GroupedLoRALinearFunction``. Saves x and the parameters: the weight
    that is multiplied lives for its product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        coefficients: Tensor,
        route_weights: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        group_offsets: Tensor | None,
        token_index: Tensor | None,
        row_order: Tensor | None,
        row_position: Tensor | None,
        gathers: bool,
        transposed: bool,
        grid: float,
        scaling: float,
        backend: str,
    ) -> Tensor:
        ops, source = primitives(backend, x), token_index if gathers else None
        moved_by = (lora_A, lora_B, coefficients, grid, scaling, _product_dtype(backend, x))
        y = ops.sinc_gemm(x, weight, bias, transposed, group_offsets, source, *moved_by)
        bias = None if route_weights is None else bias
        ctx.save_for_backward(
            *(x, lora_A, lora_B, coefficients, route_weights, weight, bias),
            *(group_offsets, token_index, row_order, row_position),
        )
        ctx.gathers, ctx.transposed, ctx.grid, ctx.scaling, ctx.backend = gathers, transposed, grid, scaling, backend
        return y if route_weights is None else ops.combine(y, row_position, route_weights)

    @staticmethod
    @differentiable_once("sinc_lora_linear", "moe_sinc_mlp")
    def backward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        coefficients: Tensor,
        route_weights: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        group_offsets: Tensor | None,
        token_index: Tensor | None,
        row_order: Tensor | None,
        row_position: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        needs_x, *needs, needs_route = ctx.needs_input_grad[:5]
        ops, dy = primitives(ctx.backend, x), dy.to(x.dtype)
        x_source, dy_source = (token_index if ctx.gathers else None), (None if route_weights is None else token_index)
        row_weights = None if route_weights is None else route_weights.flatten()[row_order]
        d_rows, *grads = ops.sinc_gemm_backward(
            *(dy, x, weight, ctx.transposed, group_offsets, dy_source, x_source, row_weights),
            *(lora_A, lora_B, coefficients, ctx.grid, ctx.scaling, _product_dtype(ctx.backend, x)),
            *(needs_x or needs_route, any(needs)),
        )
        leaves = zip(grads, (lora_A, lora_B, coefficients), needs, strict=True)
        low_rank = [grad.to(leaf.dtype) if needed else None for grad, leaf, needed in leaves]
        d_x = d_route = None
        if needs_x or needs_route:
            sources = (x_source, dy_source, group_offsets, row_position)
            d_x, d_route = row_gradients(ops, d_rows, x, dy, bias, row_weights, *sources)
        return d_x if needs_x else None, *low_rank, d_route, *[None] * 11


def _product_dtype(backend: str, x: Tensor) -> torch.dtype:
    """What x and the weight are multiplied in: a CPU without instructions for half precision takes fp32."""
    return torch.float32 if backend == "eager" and eager.widens(x) else x.dtype
