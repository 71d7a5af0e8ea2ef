"""grouped_lora_linear: a frozen linear layer per expert, plus low-rank updates of a rank per expert.

The function behind it also serves a whole Mixture-of-Experts layer: it can gather its rows from tokens, and it can
combine its rows into tokens. Both then happen on the way, without a copy of all rows that autograd would keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrlora_ops import _checks
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import primitives, resolve_backend
from lrlora_ops.ops._backward import differentiable_once
from lrlora_ops.ops._demand import count_demand
from lrlora_ops.rank_table import RankTable
from lrlora_ops.reference import grouped_lora_linear_reference


class GroupedLoRALinearFunction(torch.autograd.Function):
    """Rows sorted by expert ``[L, K] -> [L, N]``.

    With ``gathers`` x is ``[T, K]`` and row i is ``x[token_index[i]]``. With ``route_weights`` ``[T, k]`` the result
    is ``[T, N]``, each token's rows summed by these weights. Saves x, u and the parameters; the rows ``[L, N]`` are
    not saved, for the gradient of a route weight is ``<y_i, dy_t> = <x_i, dL/dx_i>`` before it is weighted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        base: Tensor | None,
        route_weights: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ranks: Tensor,
        components: Tensor,
        group_offsets: Tensor,
        token_index: Tensor | None,
        row_order: Tensor | None,
        row_position: Tensor | None,
        gathers: bool,
        transposed: bool,
        scaling: float,
        backend: str,
    ) -> Tensor:
        ops, source = primitives(backend, x), token_index if gathers else None
        u = ops.shrink(x, lora_A, ranks, components.shape[1], components, group_offsets, source)
        if weight is None:
            y = ops.expand(u, lora_B, ranks, scaling, gate, components, group_offsets, base)
        else:
            low_rank = (u, lora_B, ranks, scaling, gate, components)
            y = ops.grouped_gemm(x, weight, bias, transposed, group_offsets, source, *low_rank)
        ctx.save_for_backward(
            *(x, lora_A, lora_B, gate, route_weights, weight, bias, ranks, components, group_offsets),
            *(token_index, row_order, row_position, u),
        )
        ctx.gathers, ctx.transposed, ctx.scaling, ctx.backend = gathers, transposed, scaling, backend
        return y if route_weights is None else ops.combine(y, row_position, route_weights)

    @staticmethod
    @differentiable_once("grouped_lora_linear", "moe_lora_mlp")
    def backward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        route_weights: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ranks: Tensor,
        components: Tensor,
        group_offsets: Tensor,
        token_index: Tensor | None,
        row_order: Tensor | None,
        row_position: Tensor | None,
        u: Tensor,
    ) -> tuple[Tensor | None, ...]:
        needs_x, needs_a, needs_b, needs_gate, needs_base, needs_route = ctx.needs_input_grad[:6]
        ops, scaling, owners = primitives(ctx.backend, x), ctx.scaling, (components, group_offsets)
        x_source, dy_source = (token_index if ctx.gathers else None), (None if route_weights is None else token_index)
        row_weights = None if route_weights is None else route_weights.flatten()[row_order]
        d_x = d_a = d_b = d_gate = d_route = None
        dy_lora = dy.to(x.dtype)
        v, d_b, d_gate = ops.shrink_gram(
            dy_lora, lora_B, _weighted(u, row_weights), ranks, scaling, gate, *owners, dy_source
        )
        if needs_a:
            v_weighted = _weighted(v, row_weights)
            d_a = ops.gram(v_weighted, x, ranks, lora_A.shape[0], scaling, lora_A.dtype, gate, *owners, x_source)
        if needs_x or needs_route:
            low_rank = (v, lora_A, ranks, scaling, gate, components)
            if weight is None:
                d_rows = ops.expand(*low_rank, group_offsets)
            else:
                d_rows = ops.grouped_gemm(
                    dy_lora, weight, None, not ctx.transposed, group_offsets, dy_source, *low_rank
                )
            sources = (x_source, dy_source, group_offsets, row_position)
            d_x, d_route = row_gradients(ops, d_rows, x, dy_lora, bias, row_weights, *sources)
        d_base = dy.masked_fill(_of_no_expert(group_offsets, dy.shape[0])[:, None], 0.0) if needs_base else None
        return (
            *(d_x if needs_x else None, d_a, d_b if needs_b else None, d_gate if needs_gate else None),
            *(d_base, d_route, *[None] * 12),
        )


def _weighted(u: Tensor, row_weights: Tensor | None) -> Tensor:
    return u if row_weights is None else (u * row_weights[:, None]).to(u.dtype)


def _of_no_expert(group_offsets: Tensor, num_rows: int) -> Tensor:
    """bool ``[L]``: which rows belong to no expert."""
    return torch.arange(num_rows, device=group_offsets.device) >= group_offsets[-1]


def row_gradients(
    ops: Any,
    d_rows: Tensor,
    x: Tensor,
    dy: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    x_source: Tensor | None,
    dy_source: Tensor | None,
    group_offsets: Tensor | None,
    row_position: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, and of the routing weights or None, from ``d_rows`` ``[L, K]``, which is used up.

    Those are the rows' gradients before ``row_weights`` ``[L]``. ``x_source`` and ``dy_source`` are ``[L]``, the tokens
    that the rows were gathered from and that they were combined in, if they were.
    """
    d_route = None
    if row_weights is not None:
        inner = _inner_products(d_rows, x, x_source) + _bias_products(dy, bias, group_offsets, dy_source)
        d_route = inner[row_position].to(row_weights.dtype)
        d_rows.mul_(row_weights[:, None])
    return d_rows if x_source is None else ops.combine(d_rows, row_position), d_route


def _inner_products(d_rows: Tensor, x: Tensor, source: Tensor | None) -> Tensor:
    """``[L]``: ``<x[i], d_rows[i]>`` in fp32 or wider."""
    return (d_rows * (x if source is None else x[source])).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def _bias_products(
    dy: Tensor, bias: Tensor | None, group_offsets: Tensor | None, token_index: Tensor | None
) -> Tensor | float:
    """``[L]``: ``<bias[e_i], dy[token of row i]>``, 0 for rows of no expert."""
    if bias is None or group_offsets is None or token_index is None:
        return 0.0
    num_experts, num_rows = bias.shape[0], token_index.shape[0]
    rows = torch.arange(num_rows, device=dy.device, dtype=torch.int32)
    expert = torch.searchsorted(group_offsets[1:], rows, right=True).clamp(max=num_experts - 1)
    products = (dy @ bias.t())[token_index, expert]
    return products.masked_fill(_of_no_expert(group_offsets, num_rows), 0.0)


def grouped_lora_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    group_offsets: Tensor,
    table: RankTable,
    *,
    gate: Tensor | None = None,
    scaling: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    transposed: bool = False,
    ranks: Tensor | None = None,
    demand: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y[i] = base[i] + scaling * sum over components j of expert e_i: gate_j <x[i], a_j> b_j``.

    The base is ``weight[e_i] x[i] + bias[e_i]``. Expert e has the rows ``group_offsets[e]`` to ``group_offsets[e + 1]``
    and the components ``table.components[e, :ranks[e]]``; experts without rows or of rank 0 cost nothing beyond the
    base. Rows past ``group_offsets[E]`` belong to no expert: the output and the gradients are zero there.

    Args:
        x: ``[L, K]``, rows sorted by expert, in fp32, fp16 or bf16 (fp64 on the eager and reference backends).
        lora_A: ``[R, K]``, one row a component of the pool, in x's dtype or fp32.
        lora_B: ``[R, N]``, likewise.
        group_offsets: int32 ``[E + 1]``, not decreasing, the first 0 and the last at most L.
        table: Which expert owns which pool rows.
        gate: fp32 ``[R]``, or None for ones. Its gradient is the sensitivity ``c_j = dL/dgate_j``.
        scaling: Factor of the update.
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; frozen.
        bias: ``[E, N]``, frozen; only with ``weight``.
        base: ``[L, N]``, the base product as computed elsewhere. Without ``weight`` and ``base``: the update alone.
        transposed: The layout of ``weight``.
        ranks: int32 ``[E]``, the live components of each expert; default ``table.ranks``.
        demand: fp32 ``[2, E]`` whose gradient becomes, twice, the number of the experts' rows on which the loss depends
            (``RankTable.demand``).
        backend: "triton", "eager", "reference" or None for triton on a GPU and eager elsewhere.

    Returns:
        ``[L, N]`` in base's dtype, or in x's. Under autocast x, weight and bias are cast as ``F.linear`` does.

    Raises:
        ValueError: A shape, dtype or device does not fit, ``weight`` or ``bias`` requires a gradient, or the
            backend cannot run here.
        RuntimeError: The result is differentiated twice; ``backend="reference"`` supports that.
    """
    x, weight, bias, base = autocast_operands(x, weight, bias, base)  # type: ignore[assignment]
    ranks = table.ranks if ranks is None else ranks
    _checks.check_grouped(x, lora_A, lora_B, group_offsets, table, gate, ranks, weight, bias, base, transposed)
    backend = resolve_backend(backend, x.device)
    _checks.check_backend_dtypes(backend, x=x, lora_A=lora_A, lora_B=lora_B, base=base)
    if backend == "reference":
        y = grouped_lora_linear_reference(
            *(x, lora_A, lora_B, group_offsets, table),
            gate=gate,
            scaling=scaling,
            weight=weight,
            bias=bias,
            base=base,
            transposed=transposed,
            ranks=ranks,
        )
        return y.to(x.dtype if base is None else base.dtype)
    with without_autocast(x.device):
        y = GroupedLoRALinearFunction.apply(
            *(x, lora_A, lora_B, gate_operand(gate, x), base, None, weight, bias),
            *(ranks, table.components, group_offsets, None, None, None),
            *(False, transposed, scaling, backend),
        )
    return count_demand(y, demand, group_offsets)


def gate_operand(gate: Tensor | None, x: Tensor) -> Tensor | None:
    """The gate as the primitives take it: fp32, or fp64 for fp64 inputs."""
    return None if gate is None else gate.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
