"""moe_sinc_mlp: the experts of a Mixture-of-Experts layer, their weights moved by a learned elementwise function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrlora_ops import _checks
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import resolve_backend
from lrlora_ops.ops._routed_mlp import check_routed, routed_mlp
from lrlora_ops.ops._sinc_function import SincFunction
from lrlora_ops.routing import Routing


@dataclass(frozen=True)
class SincExpertLinear:
    """One projection of all experts: the frozen layers, and what moves their weights, as in ``sinc_lora_linear``.

    Attributes:
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; frozen.
        lora_A: ``[E * R, K]``, the R rows of each expert after those of the one before; in x's dtype or fp32.
        lora_B: ``[E * R, N]``, likewise.
        coefficients: c, ``[2n + 1]``, of all experts; fp32 or fp64, in units of the elements of ``B^T A``.
        grid: h, the distance of two sinc functions, in the same units.
        bias: ``[E, N]``, or None; frozen.
        transposed: The layout of ``weight``.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    coefficients: Tensor
    grid: float
    bias: Tensor | None = None
    transposed: bool = False


def moe_sinc_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: SincExpertLinear,
    down: SincExpertLinear,
    *,
    activation: Callable[[Tensor], Tensor] | str,
    post: Callable[[Tensor], Tensor] | None = None,
    scaling: float = 1.0,
    demand: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``moe_lora_mlp`` with ``(W[e] + scaling * phi(B_e^T A_e)) x + bias[e]`` for each projection of each expert.

    Between forward and backward x, the rows before the second projection and what the activation keeps are held. A
    moved weight lives for its product: on a GPU those of all experts that have rows in one buffer of the size of the
    projection's weights; on a CPU a block of rows of one expert's.

    Args:
        x, top_k_index, top_k_weights, activation, post, demand, backend: As ``moe_lora_mlp`` has them.
        up: The first projection.
        down: The second projection.
        scaling: Factor of the updates.

    Returns:
        ``[T, H]`` in x's dtype; under autocast in autocast's. Gradients flow to x, top_k_weights, ``lora_A``,
        ``lora_B`` and ``coefficients``.

    Raises:
        ValueError: A shape, dtype or device does not fit, a weight requires a gradient, or the backend cannot run.
        RuntimeError: The result is differentiated twice.
    """
    operands: Any = autocast_operands(x, up.weight, up.bias, down.weight, down.bias)
    x, up_weight, up_bias, down_weight, down_bias = operands
    scaling = float(scaling)  # under torch.compile(dynamic=True) a symbol, which an autograd.Function cannot take
    backend = resolve_backend(backend, x.device)
    check_routed(x, top_k_index, top_k_weights, activation, backend)
    routing = Routing.from_topk(top_k_index, up.weight.shape[0], backend)

    def project(
        rows: Tensor,
        linear: SincExpertLinear,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        gathers: bool,
    ) -> Tensor:
        low_rank = (linear.lora_A, linear.lora_B, linear.coefficients)
        _checks.check_sinc_experts(rows, weight, *low_rank, linear.grid, bias, linear.transposed)
        _checks.check_backend_dtypes(backend, x=rows, lora_A=linear.lora_A, lora_B=linear.lora_B)
        with without_autocast(x.device):
            return SincFunction.apply(
                *(rows, *low_rank, weights, weight, bias, routing.group_offsets),
                *(routing.token_index, routing.row_order, routing.row_position),
                *(gathers, linear.transposed, float(linear.grid), scaling, backend),
            )

    return routed_mlp(
        *(x, top_k_index, top_k_weights, routing),
        lambda tokens: project(tokens, up, up_weight, up_bias, None, gathers=True),
        lambda rows, weights: project(rows, down, down_weight, down_bias, weights, gathers=False),
        *(activation, post, demand),
    )
