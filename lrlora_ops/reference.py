"""The oracle of the parity tests: slow, obvious, in fp64, sharing no code with the backends.

Gradients come from autograd through these loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrlora_ops.rank_table import RankTable


def lora_linear_reference(
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
) -> Tensor:
    """``y = base + scaling * sum_{j < rank} gate_j <x, a_j> b_j`` in fp64, shapes as for ``lora_linear``."""
    x, lora_A, lora_B = x.double(), lora_A.double(), lora_B.double()
    live = lora_A.shape[0] if rank is None else int(rank)
    y = x.new_zeros(*x.shape[:-1], lora_B.shape[1])
    if base is not None:
        y = y + base.double()
    if weight is not None:
        y = y + torch.einsum("...k,nk->...n", x, weight.double())
    if bias is not None:
        y = y + bias.double()
    for j in range(live):
        factor = scaling if gate is None else scaling * gate[j].double()
        y = y + factor * torch.einsum("...k,k,n->...n", x, lora_A[j], lora_B[j])
    return y


def grouped_lora_linear_reference(
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
) -> Tensor:
    """Expert by expert ``lora_linear_reference``; rows past the last offset are zero."""
    x, offsets, ranks = x.double(), group_offsets.tolist(), table.ranks if ranks is None else ranks
    pieces = []
    for expert in range(table.num_experts):
        rows = slice(offsets[expert], offsets[expert + 1])
        own = table.components[expert, : int(ranks[expert])].long()
        expert_weight = None if weight is None else (weight[expert].t() if transposed else weight[expert])
        pieces.append(
            lora_linear_reference(
                x[rows],
                lora_A[own],
                lora_B[own],
                gate=None if gate is None else gate[own],
                scaling=scaling,
                weight=expert_weight,
                bias=None if bias is None else bias[expert],
                base=None if base is None else base[rows],
            )
        )
    pieces.append(x.new_zeros(x.shape[0] - offsets[-1], lora_B.shape[1]))
    return torch.cat(pieces)


def moe_lora_mlp_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    projections: Sequence[Callable[[Tensor, int], Tensor]],
    activation: Callable[[Tensor], Tensor],
    num_experts: int,
) -> Tensor:
    """``out[t] = sum_k weights[t, k] * down(activation(up(x[t])))`` of expert ``top_k_index[t, k]``, token by token.

    Args:
        x: fp64 ``[T, H]``.
        top_k_index: ``[T, k]``; an index of ``num_experts`` or more adds nothing.
        top_k_weights: ``[T, k]``.
        projections: ``up(rows, expert)`` and ``down(rows, expert)``, both with their adapters.
        activation: Of the rows between them.
        num_experts: E.
    """
    up, down = projections
    out = []
    for token, experts, weights in zip(x, top_k_index.tolist(), top_k_weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts, weights, strict=True):
            if expert < num_experts:
                total = total + weight * down(activation(up(token[None], expert)), expert)[0]
        out.append(total)
    return torch.stack(out) if out else torch.zeros_like(x)


def sinc_lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    coefficients: Tensor,
    *,
    grid: float,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x (W + scaling * phi(B^T A))^T + bias`` in fp64, shapes as for ``sinc_lora_linear``."""
    z = torch.einsum("rn,rk->nk", lora_B.double(), lora_A.double())
    phi, reach = z, coefficients.shape[0] // 2
    for k, c in zip(range(-reach, reach + 1), coefficients.double(), strict=True):
        phi = phi + c * (torch.sinc(z / grid - k) - float(k == 0))
    y = torch.einsum("...k,nk->...n", x.double(), weight.double() + scaling * phi)
    return y if bias is None else y + bias.double()
