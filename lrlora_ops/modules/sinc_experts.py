"""SincLoRAExperts: the experts of transformers, their weights moved by a learned elementwise function of ``B^T A``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.modules._experts import ExpertsAdapter, around_products, frozen_linear
from lrlora_ops.modules._interface import attach
from lrlora_ops.modules._sinc import SincPool
from lrlora_ops.ops import SincExpertLinear, moe_sinc_mlp
from lrlora_ops.rank_table import RankTable


class SincLoRAExperts(ExpertsAdapter):
    """The adapter of all experts of a layer; it lives in the experts module as ``experts.lrlora``.

    Each projection computes ``(W[e] + scaling * phi(B_e^T A_e)) x + bias[e]``, with phi as ``SincLoRALinear`` has it.
    Every expert has R rows of A and of B, which stay. phi is one for all experts of a projection: an expert that sees
    few rows would learn a function of its own from these alone.

    Attributes:
        gate_up_proj: ``lora_A`` ``[E * R, H]``, ``lora_B`` ``[E * R, 2 I]`` and ``coefficients`` ``[2n + 1]``; named
            ``up_proj`` where experts have no gate.
        down_proj: ``lora_A`` ``[E * R, I]``, ``lora_B`` ``[E * R, H]`` and ``coefficients``.
        scaling: ``lora_alpha / rank``.
        table: Its ``RankTable``, whose ranks are all R.
    """

    reports_sensitivity = False

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        *,
        rank: int = 8,
        num_coefficients: int = 9,
        grid: float | None = None,
        lora_alpha: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> SincLoRAExperts:
        """Adapt an experts module of transformers (one on its experts interface), in place.

        Args:
            experts: E.g. ``model.model.layers[0].mlp.experts``; its parameters are frozen.
            rank: R, of every expert.
            num_coefficients, grid: As for ``SincLoRALinear``; the default of the grid is each projection's own.
            lora_alpha: Default ``2 * rank``, so that scaling is 2.
            dtype: Of ``lora_A`` and ``lora_B``; default fp32, or fp64 for fp64 experts.

        Returns:
            The adapter, also at ``experts.lrlora``.

        Raises:
            ValueError: The module is not on the interface, is adapted already, or a setting is out of range.
        """
        adapter = cls.for_experts(
            experts, rank=rank, num_coefficients=num_coefficients, grid=grid, lora_alpha=lora_alpha, dtype=dtype
        )
        experts.requires_grad_(False)
        attach(experts, adapter)
        return adapter

    @classmethod
    def for_experts(
        cls,
        experts: Any,
        *,
        rank: int,
        num_coefficients: int,
        grid: float | None,
        lora_alpha: float | None,
        dtype: torch.dtype | None,
    ) -> SincLoRAExperts:
        """What ``from_experts`` makes, but the experts are left as they are until ``install``."""
        features, num_experts, device, dtype = cls._described(experts, dtype)
        self = cls()
        pools = {
            name: SincPool(num_experts * rank, *sizes, device, dtype, num_coefficients, grid)
            for name, sizes in features.items()
        }
        table = RankTable.uniform(num_experts, rank, device=device, num_projections=len(features))
        self._add_pools(pools, table, lora_alpha)
        return self

    def forward(self, experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H] -> [T, H]``: what the experts module computes, with the updates in its weights.

        Args:
            experts: The module that this one is a child of.
            hidden: ``[T, H]`` in fp32, fp16 or bf16.
            top_k_index: integer ``[T, k]``; the number of experts means "not here".
            top_k_weights: ``[T, k]``, floating point.

        Raises:
            ValueError: As ``moe_sinc_mlp``.
        """
        self._follow_device()
        demand = self.table.demand if self.training else None
        return self.run(experts, hidden, top_k_index, top_k_weights, demand=demand)

    def run(self, experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **options: Any) -> Tensor:
        """``moe_sinc_mlp`` of the experts; ``options`` are its."""
        up, down = (
            SincExpertLinear(
                lora_A=pool.lora_A,
                lora_B=pool.lora_B,
                coefficients=pool.in_units_of_z(),
                grid=pool.grid,
                **frozen_linear(experts, name),
            )
            for name, pool in self.sinc_pools().items()
        )
        around = around_products(experts)
        return moe_sinc_mlp(hidden, top_k_index, top_k_weights, up, down, **around, scaling=self.scaling, **options)

    def sinc_pools(self) -> dict[str, SincPool]:
        """``pools``, as what they are."""
        return self.pools()  # type: ignore[return-value]

    def shown_rank(self) -> Tensor:
        return self.stable_rank()

    def stable_rank(self) -> Tensor:
        """fp32 ``[E]``: the mean over an expert's projections of ``||dW||_F^2 / ||dW||_2^2``, 0 while dW is zero.

        It makes the update of each expert, one at a time: about what a forward pass through all of them does.
        """
        own = [pool.stable_ranks(self.table, self.scaling) for pool in self.sinc_pools().values()]
        return torch.stack(own).mean(0)

    def settings(self) -> dict[str, object]:
        pools = self.sinc_pools()
        return {
            **super().settings(),
            "grid": {name: pool.grid for name, pool in pools.items()},
            "num_coefficients": len(next(iter(pools.values())).coefficients),
        }
