"""moe_lora_mlp: the experts of a Mixture-of-Experts layer from tokens to tokens, every expert with its own rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lrlora_ops import _checks
from lrlora_ops.ops._autocast import autocast_operands, without_autocast
from lrlora_ops.ops._backends import resolve_backend
from lrlora_ops.ops._gated_mlp import GatedMLPFunction
from lrlora_ops.ops._routed_mlp import check_routed, routed_mlp
from lrlora_ops.ops.grouped_lora_linear import GroupedLoRALinearFunction, gate_operand
from lrlora_ops.rank_table import RankTable
from lrlora_ops.routing import Routing


@dataclass(frozen=True)
class ExpertLinear:
    """One projection of all experts: the frozen layers, and the pool of components that updates them.

    Attributes:
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; frozen.
        lora_A: ``[R, K]``, one row a component of the pool, in x's dtype or fp32.
        lora_B: ``[R, N]``, likewise.
        gate: fp32 ``[R]``, or None for ones. Its gradient is the sensitivity ``c_j = dL/dgate_j``.
        bias: ``[E, N]``, or None; frozen.
        transposed: The layout of ``weight``.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None = None
    bias: Tensor | None = None
    transposed: bool = False


def moe_lora_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    table: RankTable,
    *,
    activation: Callable[[Tensor], Tensor] | str,
    post: Callable[[Tensor], Tensor] | None = None,
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    demand: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[t] = sum_k top_k_weights[t, k] * post(down_e(activation(up_e(x[t]))))`` with ``e = top_k_index[t, k]``.

    Tokens are gathered and combined inside the products: x is not permuted, an update is never materialised, and the
    rows that are combined are not saved for backward (they are where ``post`` needs them).

    Args:
        x: ``[T, H]`` in fp32, fp16 or bf16 (fp64 on the eager backend).
        top_k_index: integer ``[T, k]``, the experts of each token; E, the number of experts, drops a pair.
        top_k_weights: ``[T, k]``, floating point.
        up: The first projection, ``H -> 2 I`` if gated (gate_up_proj), else ``H -> I``.
        down: The second projection, ``I -> H``.
        table: Which expert owns which pool rows, in both projections alike.
        activation: ``[L, 2 I] -> [L, I]``, row by row, or ``[L, I] -> [L, I]``: the model's own gating function. Or the
            name of one that the Triton kernels compute on the way, ``act(gate) * up`` of rows ``[gate, up]``: "silu" or
            "gelu_tanh".
        post: ``[L, H] -> [L, H]``, row by row, on the experts' outputs, for models that normalise them.
        scaling: Factor of the updates.
        ranks: int32 ``[E]``, the live components of each expert; default ``table.ranks``.
        demand: fp32 ``[2, E]`` whose gradient becomes the number of the experts' rows on which the loss depends, and
            the sums of their routing weights (``RankTable.demand``).
        backend: "triton", "eager", or None for triton on a GPU and eager elsewhere.

    Returns:
        ``[T, H]`` in x's dtype; under autocast in autocast's. Gradients flow to x, top_k_weights, the adapters and
        the gates.

    Raises:
        ValueError: A shape, dtype or device does not fit, a weight requires a gradient, or the backend cannot run.
        RuntimeError: The result is differentiated twice.
    """
    x, up_weight, up_bias, down_weight, down_bias = autocast_operands(x, up.weight, up.bias, down.weight, down.bias)  # type: ignore[assignment]
    scaling = float(scaling)  # under torch.compile(dynamic=True) a symbol, which an autograd.Function cannot take
    ranks = table.ranks if ranks is None else ranks
    backend = resolve_backend(backend, x.device)
    check_routed(x, top_k_index, top_k_weights, activation, backend)
    routing = Routing.from_topk(top_k_index, table.num_experts, backend)

    def check(rows: Tensor, linear: ExpertLinear, weight: Tensor | None, bias: Tensor | None) -> None:
        _checks.check_expert_adapter(
            rows, linear.lora_A, linear.lora_B, table, linear.gate, ranks, weight, bias, linear.transposed
        )
        _checks.check_backend_dtypes(backend, x=rows, lora_A=linear.lora_A, lora_B=linear.lora_B)

    if isinstance(activation, str) and backend == "triton" and post is None and down_bias is None:
        check(x, up, up_weight, up_bias)
        check(x.new_empty(0, up.lora_B.shape[1] // 2), down, down_weight, None)
        with without_autocast(x.device):
            return GatedMLPFunction.apply(
                *(x, top_k_weights, up.lora_A, up.lora_B, gate_operand(up.gate, x)),
                *(down.lora_A, down.lora_B, gate_operand(down.gate, x), demand),
                *(up_weight, up_bias, down_weight, ranks, table.components, routing.group_offsets),
                *(routing.token_index, routing.row_order, routing.row_position, activation),
                *(up.transposed, down.transposed, scaling, backend),
            )

    def project(
        rows: Tensor,
        linear: ExpertLinear,
        weight: Tensor | None,
        bias: Tensor | None,
        weights: Tensor | None,
        gathers: bool,
    ) -> Tensor:
        check(rows, linear, weight, bias)
        with without_autocast(x.device):
            return GroupedLoRALinearFunction.apply(
                *(rows, linear.lora_A, linear.lora_B, gate_operand(linear.gate, rows), None),
                *(weights, weight, bias, ranks, table.components, routing.group_offsets),
                *(routing.token_index, routing.row_order, routing.row_position),
                *(gathers, linear.transposed, scaling, backend),
            )

    return routed_mlp(
        *(x, top_k_index, top_k_weights, routing),
        lambda tokens: project(tokens, up, up_weight, up_bias, None, gathers=True),
        lambda rows, weights: project(rows, down, down_weight, down_bias, weights, gathers=False),
        *(activation, post, demand),
    )
