"""sinc_lora_linear: a linear layer whose frozen weight is moved by a learned elementwise function of ``B^T A``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrlora_ops import _checks, eager
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import primitives, resolve_backend
from lrlora_ops.ops._backward import differentiable_once
from lrlora_ops.reference import sinc_lora_linear_reference

# Rows of the weight that the eager backend makes at a time: 2 MB in fp32, and enough for a quick product.
_BLOCK_ELEMENTS, _BLOCK_ROWS = 2**19, 64


class SincLoRALinearFunction(torch.autograd.Function):
    """x ``[M, K]`` -> ``[M, N]``; saves x and the parameters. The weight that is multiplied lives for its product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        coefficients: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: float,
        scaling: float,
        backend: str,
    ) -> Tensor:
        ops, dtype = primitives(backend, x), _product_dtype(backend, x)
        x_wide, out = x.to(dtype), x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
        for rows in _blocks(backend, weight):
            moved = ops.sinc_weight(weight[rows], lora_A, lora_B[:, rows], coefficients, grid, scaling, dtype)
            out[:, rows].addmm_(x_wide, moved.t(), beta=0)
        ctx.save_for_backward(x, lora_A, lora_B, coefficients, weight)
        ctx.grid, ctx.scaling, ctx.backend = grid, scaling, backend
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    @staticmethod
    @differentiable_once("sinc_lora_linear")
    def backward(
        ctx: Any, dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, coefficients: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs_x, *needs = ctx.needs_input_grad[:4]
        ops, dtype = primitives(ctx.backend, x), _product_dtype(ctx.backend, x)
        dy, x_wide = dy.to(dtype), x.to(dtype)
        d_x, d_a, d_b, d_c = None, None, [], None
        for rows in _blocks(ctx.backend, weight):
            dy_rows, frozen = dy[:, rows], weight[rows]
            low_rank = (lora_A, lora_B[:, rows], coefficients, ctx.grid, ctx.scaling)
            if any(needs):
                moved = dy_rows.t() @ x_wide  # and then the weight, in the same memory
                a_part, b_part, c_part = ops.sinc_gradients(moved, frozen if needs_x else None, *low_rank)
                d_a, d_c = _plus(d_a, a_part), _plus(d_c, c_part)
                d_b.append(b_part)
            elif needs_x:
                moved = ops.sinc_weight(frozen, *low_rank, dtype)
            if needs_x:
                d_x = dy_rows @ moved if d_x is None else d_x.addmm_(dy_rows, moved)
        grads: list[Any] = [d_x, d_a, torch.cat(d_b, 1) if d_b else None, d_c]
        for index, leaf in enumerate((x, lora_A, lora_B, coefficients)):
            grads[index] = grads[index].to(leaf.dtype) if ctx.needs_input_grad[index] else None
        return *grads, *[None] * 5


def sinc_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    coefficients: Tensor,
    *,
    grid: float,
    scaling: float,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = x (W + scaling * phi(Z))^T + bias`` with ``Z = B^T A`` and phi applied to each element of Z:

    ``phi(z) = z + sum_{k=-n..n} c_k (psi_k(z) - psi_k(0))``, ``psi_k(z) = sin(pi u) / (pi u)`` at ``u = z / grid - k``.

    With ``c = 0`` it is LoRA. The sum ``W + scaling * phi(Z)`` is rounded to the dtype of the product (x's; fp32 for
    half precision on a CPU), like a merged weight: what an update moves by less than half a unit in the last place of
    an element of W does not show there yet, though its gradient is as if it did. Between forward and backward only x
    and the parameters are kept, and at most one tensor ``[N, K]`` exists at a time. Backward is deterministic.

    Args:
        x: ``[..., K]`` in fp32, fp16 or bf16 (fp64 on the eager and reference backends).
        weight: W, ``[N, K]``, frozen, in x's dtype.
        lora_A: ``[R, K]``, in x's dtype or fp32.
        lora_B: ``[R, N]``, likewise.
        coefficients: c, ``[2n + 1]``, for k from -n to n, fp32 or fp64; in units of z.
        grid: Distance h of neighbouring sinc functions, in units of z; they are centred at ``k h``.
        scaling: Factor of the update.
        bias: ``[N]``, frozen.
        backend: "triton", "eager", "reference" or None for triton on a GPU and eager elsewhere.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weight and bias are cast as ``F.linear`` does.

    Raises:
        ValueError: A shape, dtype or device does not fit, ``weight`` or ``bias`` requires a gradient, or the
            backend cannot run here.
        RuntimeError: The result is differentiated twice; ``backend="reference"`` supports that.
    """
    x, weight, bias = autocast_operands(x, weight, bias)  # type: ignore[assignment]
    _checks.check_sinc(x, weight, lora_A, lora_B, coefficients, grid, bias)
    backend = resolve_backend(backend, x.device)
    _checks.check_backend_dtypes(backend, x=x, lora_A=lora_A, lora_B=lora_B, coefficients=coefficients)
    if backend == "reference":
        y = sinc_lora_linear_reference(x, weight, lora_A, lora_B, coefficients, grid=grid, scaling=scaling, bias=bias)
        return y.to(x.dtype)
    rows = math.prod(x.shape[:-1])
    with without_autocast(x.device):
        y = SincLoRALinearFunction.apply(
            x.reshape(rows, x.shape[-1]), lora_A, lora_B, coefficients, weight, bias, grid, scaling, backend
        )
    return y.view(*x.shape[:-1], lora_B.shape[1])


def _product_dtype(backend: str, x: Tensor) -> torch.dtype:
    """What x and the weight are multiplied in: a CPU without instructions for half precision takes fp32."""
    return torch.float32 if backend == "eager" and eager.widens(x) else x.dtype


def _blocks(backend: str, weight: Tensor) -> Iterator[slice]:
    """Rows of the weight that are made and multiplied at a time: all of them, but on a CPU what its caches hold.

    A traced graph has them all at once, for its size should not depend on the weight's.
    """
    num_rows, num_cols = weight.shape
    size = max(num_rows, 1)
    if backend == "eager" and not torch.compiler.is_compiling():
        size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(num_cols, 1))
    return (slice(first, first + size) for first in range(0, max(num_rows, 1), size))


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
