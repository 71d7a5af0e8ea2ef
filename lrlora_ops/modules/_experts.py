"""What adapters of an experts module of transformers have in common: they are a child module of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.modules._adapter import ComponentPool, RankAdapter
from lrlora_ops.modules._interface import (
    CHILD,
    attach,
    detach,
    expert_features,
    expert_projections,
    gating,
    require_plain_experts,
)
from lrlora_ops.modules._merge import check_merged_experts
from lrlora_ops.rank_table import RankTable


class ExpertsAdapter(RankAdapter):
    """The adapter of all experts of a layer, at ``experts.lrlora``; subclasses say what its pools compute.

    Attributes:
        projections: Names of the pools, submodules: "gate_up_proj" ("up_proj" where experts have no gate), "down_proj".
    """

    projections: tuple[str, ...]

    def _add_pools(self, projections: Mapping[str, ComponentPool], table: RankTable, lora_alpha: float | None) -> None:
        self._add_table(table, lora_alpha)
        for name, pool in projections.items():
            self.add_module(name, pool)
        self.projections = tuple(projections)

    @staticmethod
    def _described(
        experts: Any, dtype: torch.dtype | None
    ) -> tuple[dict[str, tuple[int, int]], int, torch.device, torch.dtype]:
        """Inputs and outputs of each projection, the experts, their device, and the dtype of an adapter for them.

        Raises:
            ValueError: The module is not on the interface, is quantised, or is adapted already.
        """
        names = expert_projections(experts)
        require_plain_experts(experts)
        if hasattr(experts, CHILD):
            raise ValueError("the experts have an adapter already, at .lrlora; adopt that one, or merge it first")
        weight = getattr(experts, names[0])
        if dtype is None:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return {name: expert_features(experts, name) for name in names}, weight.shape[0], weight.device, dtype

    def install(self, model: nn.Module, host: nn.Module) -> None:
        attach(host, self)

    def merge_into(self, host: nn.Module) -> nn.Module:
        return self.merge(host)

    def plain(self, host: nn.Module) -> nn.Module:
        return detach(host, host)

    def pools(self) -> dict[str, ComponentPool]:
        return {name: self.get_submodule(name) for name in self.projections}  # type: ignore[misc]

    @property
    def ranks(self) -> Tensor:
        """int32 ``[E]`` on the device: the rank of each expert."""
        return self.table.ranks

    def delta_weight(self, projection: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[N, K]``: the update of one projection of one expert, whatever layout the experts' weights have.

        Args:
            projection: "gate_up_proj" ("up_proj" where experts have no gate) or "down_proj".
            expert: Its index.
            dtype: To compute in; default fp32, or wider.
        """
        return self.pools()[projection].delta(self.table.rows_of(expert), self.scaling, dtype)

    @torch.no_grad()
    def merge(self, experts: Any) -> nn.Module:
        """A copy of the experts module, plain again, with the updates in its weights; checked against the adapter's
        forward.

        Raises:
            RuntimeError: The merged module's output differs from the adapter's.
        """
        merged = detach(copy.deepcopy(experts), experts)
        for name in self.projections:
            self.add_update(name, getattr(merged, name), experts.is_transposed)
        check_merged_experts(experts, merged)
        return merged

    def extra_repr(self) -> str:
        return f"num_experts={self.table.num_experts}, max_rank={self.max_rank}, pool_size={self.table.pool_size}"


def frozen_linear(experts: Any, name: str) -> dict[str, Any]:
    """The frozen part of a projection, as the ops of experts take it."""
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return {"weight": getattr(experts, name), "bias": bias, "transposed": experts.is_transposed}


def around_products(experts: Any) -> dict[str, Any]:
    """What the experts compute between and after their projections, as the ops of experts take it."""
    post = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    return {"activation": gating(experts), "post": post}
