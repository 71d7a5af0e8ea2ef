"""VariableRankLoRAExperts: a rank per expert for the experts modules of transformers, as a child module of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.modules._adapter import ComponentPool, set_ranks
from lrlora_ops.modules._experts import ExpertsAdapter, around_products, frozen_linear
from lrlora_ops.modules._interface import attach, expert_projections
from lrlora_ops.ops import ExpertLinear, moe_lora_mlp
from lrlora_ops.rank_table import RankTable


class VariableRankLoRAExperts(ExpertsAdapter):
    """The adapter of all experts of a layer; it lives in the experts module as ``experts.lrlora``.

    Each projection computes ``W[e] x + bias[e] + scaling * sum over components j of expert e: <x, a_j> b_j``. The
    components of an expert serve both of its projections, whose ranks are thereby tied. The experts module keeps
    its parameters, frozen, under their names.

    Attributes:
        gate_up_proj: ``lora_A`` ``[R, H]`` and ``lora_B`` ``[R, 2 I]``; named ``up_proj`` where experts have no gate.
        down_proj: ``lora_A`` ``[R, I]`` and ``lora_B`` ``[R, H]``.
        scaling: ``lora_alpha / max_rank``; it stays what it was when ranks change.
        table: The ``RankTable`` that says which expert owns which rows of both pools.
    """

    def __init__(self, projections: dict[str, ComponentPool], table: RankTable, lora_alpha: float | None) -> None:
        super().__init__()
        self._add_pools(projections, table, lora_alpha)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        *,
        max_rank: int = 32,
        rank: int = 8,
        pool_rank: int | None = None,
        lora_alpha: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> VariableRankLoRAExperts:
        """Adapt an experts module of transformers (one on its experts interface), in place.

        Args:
            experts: E.g. ``model.model.layers[0].mlp.experts``; its parameters are frozen.
            max_rank: The most components that one expert may own.
            rank: Of every expert at the start.
            pool_rank: Components held per expert on the average; default ``max_rank``.
            lora_alpha: Default ``2 * max_rank``, so that scaling is 2.
            dtype: Of the adapter; default fp32, or fp64 for fp64 experts.

        Returns:
            The adapter, also at ``experts.lrlora``.

        Raises:
            ValueError: The module is not on the interface, is adapted already, or a size is out of range.
        """
        adapter = cls.for_experts(
            experts, max_rank=max_rank, rank=rank, pool_rank=pool_rank, lora_alpha=lora_alpha, dtype=dtype
        )
        experts.requires_grad_(False)
        attach(experts, adapter)
        return adapter

    @classmethod
    def for_experts(
        cls,
        experts: Any,
        *,
        max_rank: int,
        rank: int,
        pool_rank: int | None,
        lora_alpha: float | None,
        dtype: torch.dtype | None,
    ) -> VariableRankLoRAExperts:
        """What ``from_experts`` makes, but the experts are left as they are until ``install``."""
        features, num_experts, device, dtype = cls._described(experts, dtype)
        pool_size = num_experts * (max_rank if pool_rank is None else pool_rank)
        table = RankTable.uniform(num_experts, rank, max_rank, pool_size, device, num_projections=len(features))
        pools = {name: ComponentPool(pool_size, *sizes, device, dtype) for name, sizes in features.items()}
        return cls(pools, table, lora_alpha)

    def set_ranks(self, ranks: Sequence[int] | Tensor) -> None:
        """Give every expert a new rank, in all its projections. Components that become live start with ``b = 0``:
        growing leaves the output bit-identical.

        Args:
            ranks: E integers from 0 to ``max_rank``, with a sum within the pool.

        Raises:
            ValueError: A rank is out of range, or the pool too small; nothing is changed then.
        """
        set_ranks([self], self.table, ranks)

    def forward(self, experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H] -> [T, H]``: what the experts module computes, with the adapters.

        Args:
            experts: The module that this one is a child of.
            hidden: ``[T, H]`` in fp32, fp16 or bf16.
            top_k_index: integer ``[T, k]``; the number of experts means "not here".
            top_k_weights: ``[T, k]``, floating point.

        Raises:
            ValueError: As ``moe_lora_mlp``.
        """
        ranks, gates = self.running()
        pools = [(pool.lora_A, pool.lora_B, gate) for pool, gate in zip(self.pools().values(), gates, strict=True)]
        demand = self.table.demand if self.training else None
        routed = (hidden, top_k_index, top_k_weights)
        return run_experts(experts, *routed, pools, self.table, scaling=self.scaling, ranks=ranks, demand=demand)


def run_experts(
    experts: Any,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    pools: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    table: RankTable,
    **options: Any,
) -> Tensor:
    """``moe_lora_mlp`` of an experts module of transformers, ``[T, H] -> [T, H]``.

    Args:
        experts: Says its layout and has the weights.
        hidden, top_k_index, top_k_weights: As the module gets them.
        pools: lora_A ``[R, K]``, lora_B ``[R, N]`` and gate ``[R]`` or None of the first and of the second projection.
        table: Which expert owns which pool rows.
        options: As ``moe_lora_mlp`` has them.
    """
    up, down = (
        ExpertLinear(lora_A=lora_A, lora_B=lora_B, gate=gate, **frozen_linear(experts, name))
        for name, (lora_A, lora_B, gate) in zip(expert_projections(experts), pools, strict=True)
    )
    around = around_products(experts)
    return moe_lora_mlp(hidden, top_k_index, top_k_weights, up, down, table, **around, **options)
