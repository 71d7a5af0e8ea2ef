"""What every LoRA format writes of an adapter, and how one linear layer that was read back is compared with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations._peft_layout import padded, scaled
from lrlora_ops.modules import VariableRankLoRAExperts, VariableRankLoRALinear
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._merge import check_merge
from lrlora_ops.modules._quantised import compute_dtype

# By projection, "" for a linear layer: a [E, r, K], and b [E, r, N] with the scaling in it.
Factors = Mapping[str, tuple[Tensor, Tensor]]


def all_factors(adapters: Adapters, library: str) -> dict[str, Factors]:
    """The factors of every adapter that has any, by name; experts are padded to the largest rank of their module.

    Raises:
        ValueError: An adapter has no counterpart in the library, or all have rank 0.
    """
    found = {name: _factors(name, module, library) for name, module in adapters.modules.items()}
    found = {name: own for name, own in found.items() if own}
    if not found:
        raise ValueError("every adapter has rank 0, so there is nothing to export; export format='merged' instead")
    return found


def _factors(name: str, module: RankAdapter, library: str) -> Factors:
    if not isinstance(module, VariableRankLoRALinear | VariableRankLoRAExperts):
        raise ValueError(
            f"{name}, a {type(module).__name__}, has no counterpart in {library}, which knows low-rank updates of "
            "linear layers and of the experts of transformers; save it with Adapters.save, or merge it: export "
            "format='merged'"
        )
    rows = [module.table.rows_of(expert) for expert in range(module.table.num_experts)]
    rank = max(len(own) for own in rows)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for projection, pool in module.pools().items() if rank else ():
        a, b = (padded([t.detach()[own] for own in rows], rank) for t in (pool.lora_A, pool.lora_B))
        factors[projection] = a, scaled(b, module.scaling)
    return factors


def check_linear(module: VariableRankLoRALinear, layer: nn.Module) -> float:
    """Compare the layer that was read back with the adapter's forward, as ``check_merge`` does."""
    update, base = module.delta_weight(torch.float64), module.base_layer
    weight = module.plain_weight() if base is None else update.to(compute_dtype(base))
    return check_merge(module, layer, weight, update)
