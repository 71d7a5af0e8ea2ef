"""The experts of a layer between two projections: what a routed MLP is whatever its projections are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lrlora_ops import eager
from lrlora_ops.ops._activation import gated_activation
from lrlora_ops.ops._demand import count_demand
from lrlora_ops.routing import Routing


def check_routed(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, activation: Callable[[Tensor], Tensor] | str, backend: str
) -> None:
    """Raises ValueError for what no routed MLP takes."""
    if backend == "reference":
        raise ValueError("experts have the backends 'triton' and 'eager'; the oracle is in lrlora_ops.reference")
    if x.dim() != 2 or top_k_weights.shape != top_k_index.shape or top_k_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, top_k_index {tuple(top_k_index.shape)} and top_k_weights "
            f"{tuple(top_k_weights.shape)}; they must be [tokens, hidden], [tokens, top_k] and [tokens, top_k]"
        )
    if isinstance(activation, str) and activation not in eager.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be a function, or one of {[*eager.ACTIVATIONS]}")


def routed_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    routing: Routing,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor, Tensor | None], Tensor],
    activation: Callable[[Tensor], Tensor] | str,
    post: Callable[[Tensor], Tensor] | None,
    demand: Tensor | None,
) -> Tensor:
    """``[T, H] -> [T, H]``.

    Args:
        x, top_k_index, top_k_weights, activation, post, demand: As ``moe_lora_mlp`` has them.
        routing: Of ``top_k_index``.
        up: From tokens ``[T, H]`` to the sorted rows' first projection ``[L, .]``.
        down: From ``[L, I]`` to the rows' second projection ``[L, H]`` or, given weights ``[T, k]``, to its sum by
            tokens ``[T, H]``.
    """
    # A dropped pair adds nothing, whatever its weight: even NaN.
    top_k_weights = top_k_weights.masked_fill(top_k_index >= routing.group_offsets.shape[0] - 1, 0.0)
    rows = up(x)
    hidden = gated_activation(rows, activation) if isinstance(activation, str) else activation(rows).to(x.dtype)
    row_weights = top_k_weights.detach().flatten()[routing.row_order]
    if post is None:
        out = down(hidden, top_k_weights)
    else:
        rows = post(down(hidden, None))
        out = (rows[routing.row_position] * top_k_weights[..., None]).sum(1).to(x.dtype)
    return count_demand(out, demand, routing.group_offsets, row_weights, routing.token_index)
