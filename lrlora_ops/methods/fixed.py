"""FixedRank: plain LoRA, a rank that never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrlora_ops.rank_table import RankTable


@dataclass(frozen=True)
class FixedRank:
    """LoRA (arXiv 2106.09685), ``W + scaling * sum_{j < rank} outer(b_j, a_j)``: one rank for every adapter, for good.

    Args:
        rank: Rank of each group, a dense layer or one expert; 0 leaves the layer as it is.

    Raises:
        ValueError: The rank is not an integer, or is negative.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank is {self.rank!r}; it must be an integer of at least 0")

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def initial_rank(self) -> int:
        return self.rank

    def policy(self, tables: Mapping[str, RankTable]) -> FixedRankPolicy:
        return FixedRankPolicy(self.rank * sum(table.num_experts for table in tables.values()))


class FixedRankPolicy:
    """Leaves the ranks alone, and has nothing to remember."""

    total_steps: int | None = None
    frozen = True
    needs_loss = False

    def __init__(self, budget: int | None) -> None:
        self.budget = budget

    def step(self, loss: Tensor | None = None) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""
