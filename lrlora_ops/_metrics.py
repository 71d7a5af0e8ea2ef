"""What a training loop logs about its ranks: a handful of numbers, whatever the number of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters


def metrics(adapters: Adapters) -> dict[str, float]:
    """See ``Adapters.metrics``. One transfer from the device, or one per device of the model."""
    if not adapters.tables:
        return {}
    ranks = [table.ranks for table in adapters.tables.values()]
    by_device: dict[torch.device, list[int]] = {}
    for device in dict.fromkeys(own.device for own in ranks):
        by_device[device] = torch.cat([own for own in ranks if own.device == device]).tolist()
    kinds: dict[str, list[int]] = {}
    for name, own in zip(adapters.tables, ranks, strict=True):
        rest = by_device[own.device]
        kinds.setdefault(kind(name), []).extend(rest[: len(own)])
        del rest[: len(own)]
    everything = [rank for own_ranks in kinds.values() for rank in own_ranks]
    figures: dict[str, float] = {
        "lrlora/rank_mean": sum(everything) / len(everything),
        "lrlora/rank_min": min(everything),
        "lrlora/rank_max": max(everything),
        "lrlora/rank_sum": sum(everything),
    }
    budgets = [policy.budget for policy in adapters.policies]
    if None not in budgets:
        figures["lrlora/budget"] = sum(budget for budget in budgets if budget is not None)
    shown = [module.shown_rank() for module in adapters.modules.values()]
    stable = [rank for own in shown if own.is_floating_point() for rank in own.flatten().tolist()]
    if stable:
        figures["lrlora/stable_rank_mean"] = sum(stable) / len(stable)
    if len(kinds) > 1:
        figures |= {f"lrlora/rank_mean/{kind}": sum(own) / len(own) for kind, own in kinds.items()}
    return figures


def kind(name: str) -> str:
    """What the layers of a model have in common that differ in their number: ``q_proj``, ``experts``."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
