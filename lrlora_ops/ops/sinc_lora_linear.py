"""sinc_lora_linear: a linear layer whose frozen weight is moved by a learned elementwise function of ``B^T A``."""

from __future__ import annotations

import math

from torch import Tensor

from lrlora_ops import _checks
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import resolve_backend
from lrlora_ops.ops._sinc_function import SincFunction
from lrlora_ops.reference import sinc_lora_linear_reference


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
        y = SincFunction.apply(
            *(x.reshape(rows, x.shape[-1]), lora_A, lora_B, coefficients, None),
            *(weight[None], None if bias is None else bias[None], None, None, None, None),
            *(False, False, grid, scaling, backend),
        )
    return y.view(*x.shape[:-1], lora_B.shape[1])
