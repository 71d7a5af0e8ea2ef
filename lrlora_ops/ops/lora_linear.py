"""lora_linear: a frozen linear layer plus a low-rank update whose rank is read from a device tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrlora_ops import _checks
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import add_base_product, primitives, resolve_backend
from lrlora_ops.ops._backward import differentiable_once
from lrlora_ops.reference import lora_linear_reference


class LoRALinearFunction(torch.autograd.Function):
    """x ``[M, K]`` -> ``[M, N]``; saves x, u and the parameters, and no tensor of the size of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ranks: Tensor,
        seed: Tensor | None,
        dropout: float,
        scaling: float,
        backend: str,
    ) -> Tensor:
        ops = primitives(backend, x)
        x_dropped = x if seed is None else ops.dropout(x, seed, dropout)
        u = ops.shrink(x_dropped, lora_A, ranks, lora_A.shape[0])
        start = base if bias is None else bias.expand(x.shape[0], -1)
        y = ops.expand(u, lora_B, ranks, scaling, gate, None, None, start)
        if weight is not None:
            add_base_product(backend, y, x, weight)
        ctx.save_for_backward(x, lora_A, lora_B, gate, weight, ranks, seed, u)
        ctx.dropout, ctx.scaling, ctx.backend = dropout, scaling, backend
        return y

    @staticmethod
    @differentiable_once("lora_linear")
    def backward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        ranks: Tensor,
        seed: Tensor | None,
        u: Tensor,
    ) -> tuple[Tensor | None, ...]:
        needs_x, needs_a, needs_b, needs_gate, needs_base = ctx.needs_input_grad[:5]
        ops, scaling = primitives(ctx.backend, x), ctx.scaling
        d_x = d_a = d_b = d_gate = None
        dy_lora = dy.to(x.dtype)
        if needs_b or needs_gate:
            v, d_b, d_gate = ops.shrink_gram(dy_lora, lora_B, u, ranks, scaling, gate)
        elif needs_x or needs_a:
            v = ops.shrink(dy_lora, lora_B, ranks, lora_B.shape[0])
        if needs_a:
            x_dropped = x if seed is None else ops.dropout(x, seed, ctx.dropout)
            d_a = ops.gram(v, x_dropped, ranks, lora_A.shape[0], scaling, lora_A.dtype, gate)
        if needs_x:
            d_x = ops.expand(v, lora_A, ranks, scaling, gate)
            if seed is not None:
                d_x = ops.dropout(d_x, seed, ctx.dropout)
            if weight is not None:
                add_base_product(ctx.backend, d_x, dy, weight, transposed=True)
        d_base = dy if needs_base else None
        return d_x, d_a, d_b if needs_b else None, d_gate if needs_gate else None, d_base, *[None] * 7


def lora_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    gate: Tensor | None = None,
    rank: int | Tensor | None = None,
    scaling: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``y = base + scaling * sum_{j < rank} gate_j <x, a_j> b_j`` with ``base = x weight^T + bias``.

    Cost and gradients follow the live components alone: those from ``rank`` on are neither read nor written,
    and get a gradient of exactly zero. Backward is deterministic.

    Args:
        x: ``[..., K]`` in fp32, fp16 or bf16 (fp64 on the eager and reference backends).
        lora_A: ``[R, K]``, one row a component, in x's dtype or fp32.
        lora_B: ``[R, N]``, one row a component, likewise.
        gate: fp32 or fp64 ``[R]``, or None for ones. Its gradient is the sensitivity of each
            live component, ``c_j = dL/dgate_j``, also where the gate is zero.
        rank: How many leading components are live: an int, an int32 tensor of one element on x's device (read
            there, so that a new value neither recompiles nor synchronises), or None for all R.
        scaling: Factor of the update, lora_alpha / max_rank in the modules.
        weight: ``[N, K]``, frozen; the base product is then computed here.
        bias: ``[N]``, frozen; only with ``weight``.
        base: ``[..., N]``, the base product as computed elsewhere, by a quantised layer say. Without ``weight``
            and ``base`` the result is the update alone.
        dropout: Probability of dropping each element of x on the adapter's branch. The mask is recomputed in
            backward from one seed drawn from PyTorch's generator, not stored.
        backend: "triton", "eager", "reference" or None for triton on a GPU and eager elsewhere.

    Returns:
        ``[..., N]`` in base's dtype, or in x's. Under autocast x, weight and bias are cast as ``F.linear`` does.

    Raises:
        ValueError: A shape, dtype or device does not fit, ``weight`` or ``bias`` requires a gradient, or the
            backend cannot run here.
        RuntimeError: The result is differentiated twice; ``backend="reference"`` supports that.
    """
    x, weight, bias, base = autocast_operands(x, weight, bias, base)  # type: ignore[assignment]
    _checks.check_lora_linear(x, lora_A, lora_B, gate, rank, weight, bias, base)
    backend = resolve_backend(backend, x.device)
    _checks.check_backend_dtypes(backend, x=x, lora_A=lora_A, lora_B=lora_B, base=base)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    if backend == "reference":
        if dropout:
            raise ValueError("backend 'reference' has no dropout; apply it to x of the update yourself")
        y = lora_linear_reference(
            x, lora_A, lora_B, gate=gate, rank=rank, scaling=scaling, weight=weight, bias=bias, base=base
        )
        return y.to(x.dtype if base is None else base.dtype)
    seed = torch.randint(2**62, (), device=x.device) if dropout else None
    rows, out_features = math.prod(x.shape[:-1]), lora_B.shape[1]
    with without_autocast(x.device):
        y = LoRALinearFunction.apply(
            x.reshape(rows, x.shape[-1]),
            lora_A,
            lora_B,
            None if gate is None else gate.to(torch.promote_types(x.dtype, torch.float32)).contiguous(),
            None if base is None else base.reshape(rows, out_features),
            weight,
            bias,
            _rank_tensor(rank, lora_A),
            seed,
            dropout,
            scaling,
            backend,
        )
    return y.view(*x.shape[:-1], out_features)


def _rank_tensor(rank: int | Tensor | None, lora_A: Tensor) -> Tensor:
    if isinstance(rank, Tensor):
        return rank.view(1)
    return torch.full((1,), lora_A.shape[0] if rank is None else rank, dtype=torch.int32, device=lora_A.device)
