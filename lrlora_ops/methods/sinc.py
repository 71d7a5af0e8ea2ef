"""SincUpdate: a low-rank product and a learned elementwise function of it; the rank of the update is not bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrlora_ops.methods.fixed import FixedRankPolicy
from lrlora_ops.rank_table import RankTable

SHARES = ("layer", "type", "global")


@dataclass(frozen=True)
class SincUpdate:
    """LR-LoRA's learned elementwise nonlinearity (arXiv 2606.04325), as its published description has it.

    Args:
        rank: Rows of A and B in each layer or expert, which stay; at least 1.
        num_coefficients: Sinc functions of phi, an odd number.
        grid: The distance of two of them, in units of the elements of ``B^T A``; None: ``0.1 / sqrt(in_features)``.
        share: Whose coefficients are one and the same: each layer has its own ("layer"), all layers of one kind do,
            such as every ``q_proj`` ("type"), or all layers of the method ("global"). The experts of a module share
            them in any case; their two projections are two layers.

    Raises:
        ValueError: A setting is out of range.
    """

    rank: int = 8
    num_coefficients: int = 9
    grid: float | None = None
    share: str = "layer"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be an integer of at least 1")
        if not isinstance(self.num_coefficients, int) or self.num_coefficients < 1 or self.num_coefficients % 2 == 0:
            raise ValueError(f"num_coefficients is {self.num_coefficients!r}; it must be an odd number of at least 1")
        if self.grid is not None and not 0 < self.grid < float("inf"):
            raise ValueError(f"grid is {self.grid}; it must be a finite number above 0, or None")
        if self.share not in SHARES:
            raise ValueError(f"share is {self.share!r}; it must be one of {SHARES}")

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def initial_rank(self) -> int:
        return self.rank

    def policy(self, tables: Mapping[str, RankTable]) -> FixedRankPolicy:
        return FixedRankPolicy(self.rank * sum(table.num_experts for table in tables.values()))
