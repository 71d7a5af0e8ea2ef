"""Control arms: what the ranks that another arm ended with are worth in other places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lrlora_ops.finetune.arm import Arm, ArmPlan
from lrlora_ops.methods.fixed import FixedRankPolicy
from lrlora_ops.rank_table import RankTable


@dataclass(frozen=True)
class GivenRanks:
    """A rank method: every expert has the rank that it is given, from the first step on.

    Attributes:
        ranks: A rank per expert, by adapter.
    """

    ranks: Mapping[str, tuple[int, ...]]
    initial_rank = 0

    @property
    def max_rank(self) -> int:
        return max(1, *(max(ranks) for ranks in self.ranks.values()))

    @property
    def pool_rank(self) -> int:
        """Components per expert that hold the fullest layer."""
        return max(-(-sum(ranks) // len(ranks)) for ranks in self.ranks.values())

    def policy(self, tables: Mapping[str, RankTable]) -> FixedRankPolicy:
        for name, table in tables.items():
            table.set_ranks(self.ranks[name])
        return FixedRankPolicy(sum(sum(ranks) for ranks in self.ranks.values()))


def on_wrong_experts(name: str, arm: Arm, seed: int) -> ArmPlan:
    """The plan that gives an arm's final ranks to the experts of the same layer in random order."""
    generator = torch.Generator().manual_seed(seed)
    ranks = {
        layer: tuple(own[torch.randperm(len(own), generator=generator)].tolist())
        for layer, own in arm.expert_ranks.items()
    }
    return ArmPlan(name, lambda _: GivenRanks(ranks), arm.plan.targets)
