"""The ranks of a model's adapters, as a run records and prints them: every layer, or every expert in it, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lrlora_ops import Adapters
from lrlora_ops._sharding import is_sharded
from lrlora_ops.report import shown

StableRanks = list[float | None]


def rank_list(adapters: Adapters) -> list[int]:
    """The live components: what A and B have of them, where a stable rank is shown instead."""
    return _listed([module.table.ranks for module in adapters.modules.values()])


def stable_rank_list(adapters: Adapters) -> StableRanks | None:
    """The stable ranks of what ``SincUpdate`` learns, None for the other layers; no list at all if it learns nothing.

    Nor if parameters are divided among processes, for one alone, which records, does not have them. A power iteration
    on each of these layers, and one transfer from the device: not for every step.
    """
    if any(is_sharded(parameter) for parameter in adapters.parameters()):
        return None
    ranks = [module.shown_rank().flatten() for module in adapters.modules.values()]
    if not any(rank.is_floating_point() for rank in ranks):
        return None
    stable = [
        rank if rank.is_floating_point() else torch.full_like(rank, math.nan, dtype=torch.float) for rank in ranks
    ]
    return [float(f"{rank:.4g}") if math.isfinite(rank) else None for rank in _listed(stable)]


def _listed(ranks: Sequence[torch.Tensor]) -> list[Any]:
    """Their values in one transfer; the modules of a large model may lie on several devices."""
    return torch.cat([rank.to(ranks[0].device) for rank in ranks]).tolist()


def known(ranks: Sequence[float | None] | None) -> list[float]:
    """Those that are there."""
    return [rank for rank in ranks or [] if rank is not None]


def spread(ranks: Sequence[int] | Sequence[float]) -> str:
    """Lowest, mean and highest."""
    return f"{shown(min(ranks))}/{sum(ranks) / len(ranks):.1f}/{shown(max(ranks))}"
