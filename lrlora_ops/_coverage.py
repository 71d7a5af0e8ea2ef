"""What of a model is adapted, what is not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lrlora_ops._read_past import layers_read_past
from lrlora_ops._targets import linear_routers, output_embeddings
from lrlora_ops.adapters import Adapters
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._interface import is_experts


@dataclass(frozen=True)
class Coverage:
    """Layers of one kind: those whose names differ in numbers alone.

    Attributes:
        kind: Their name, a star for each number.
        layers: How many there are.
        parameters: Of their matrices, all layers together; adapters do not count.
        rank: Sum of the ranks; None without an adapter.
        reason: Why they have no adapter; "" if they have one.
    """

    kind: str
    layers: int
    parameters: int
    rank: int | None
    reason: str


def coverage(adapters: Adapters) -> list[Coverage]:
    """Every kind of layer that has a matrix: the adapted ones first, then the others, each in the model's order."""
    ranks = {name: int(module.table.ranks.sum()) for name, module in adapters.modules.items()}
    reasons = _reasons(adapters.model)
    kinds: dict[tuple[str, str], list[tuple[int, int | None]]] = {}
    for name, module in _layers(adapters.model):
        rank = ranks.get(name)
        reason = "" if rank is not None else reasons.get(id(module)) or _reason(module)
        kinds.setdefault((kind_of(name), reason), []).append((_matrix_size(module), rank))
    found = []
    for (kind, reason), layers in kinds.items():
        sizes, held = [size for size, _ in layers], [rank for _, rank in layers if rank is not None]
        found.append(Coverage(kind, len(layers), sum(sizes), None if reason else sum(held), reason))
    return sorted(found, key=lambda row: row.rank is None)


def kind_of(name: str) -> str:
    """The name with a star for each number in it: ``model.layers.*.mlp.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a matrix of their own; what is within an adapter belongs to its layer."""
    outer = "\0"
    for name, module in model.named_modules():  # depth first
        if name.startswith(outer):
            continue
        if isinstance(module, RankAdapter) or is_experts(module):
            outer = f"{name}."
            yield name, module
        elif any(p.dim() > 1 for p in module._parameters.values() if p is not None):
            yield name, module


def _matrix_size(module: nn.Module) -> int:
    """Of a linear layer by its features, for a quantised weight is stored in another shape."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        experts = module.table.num_experts if isinstance(module, RankAdapter) else 1
        return int(module.in_features * module.out_features * experts)  # type: ignore[operator]
    return sum(p.numel() for p in module._parameters.values() if p is not None and p.dim() > 1)


def _reasons(model: nn.Module) -> dict[int, str]:
    """Why a linear layer is better left alone, by its id."""
    reasons = {
        layer: f"{reader} reads its weight {'on some paths ' if called else ''}without calling it"
        for layer, (reader, called) in layers_read_past(model).items()
    }
    reasons |= {id(module): "router: it returns choices of experts" for module in linear_routers(model)}
    return reasons | {id(module): "output embeddings, adapted if they are named" for module in output_embeddings(model)}


def _reason(module: nn.Module) -> str:
    if is_experts(module):
        return "experts: targets do not name them"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "targets do not name it"
    if hasattr(module, "in_features"):
        return f"{type(module).__name__}: adapted if it is named exactly"
    return f"{type(module).__name__}: not a linear layer"
