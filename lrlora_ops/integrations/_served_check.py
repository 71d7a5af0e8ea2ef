"""The proof of a format of a server: what it reads is what the adapters compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations._factors import check_linear
from lrlora_ops.integrations._peft_layout import CONFIG_FILE, PREFIX, TENSOR_FILE, expert_components, of_pattern
from lrlora_ops.integrations._served import Family, Server, experts_name
from lrlora_ops.modules import VariableRankLoRAExperts, VariableRankLoRALinear
from lrlora_ops.modules._interface import expert_projections
from lrlora_ops.modules._merge import check_merged_experts


def check(adapters: Adapters, directory: Path, server: Server) -> float:
    """Read a checkpoint as the server does, and compare it layer by layer on random inputs.

    Returns:
        The largest difference, relative to the norm of the layer's output.

    Raises:
        RuntimeError: A layer differs by more than rounding, or the checkpoint has more than the adapters.
    """
    family, plain = server.family(adapters.model), adapters.unadapted()
    read = _read(directory)
    differences = [0.0]
    for name, module in adapters.modules.items():
        host, layer = adapters.model.get_submodule(name), plain.get_submodule(name)
        if isinstance(module, VariableRankLoRAExperts):
            differences.append(check_merged_experts(host, _adapted_experts(name, layer, read, family)))
        elif isinstance(module, VariableRankLoRALinear):
            differences.append(check_linear(module, _AdaptedLinear(layer, read.pop(name, None))))
    extra = [name for name, (a, b) in read.items() if bool((b.mT @ a).any())]
    if extra:
        raise RuntimeError(
            f"{server.name} would adapt {extra[:5]}, which has no adapter here; nothing was exported: use "
            "format='merged'"
        )
    return max(differences)


def _read(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer of the served model: a ``[r, K]``, and b ``[r, N]`` with the scaling in it."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    tensors = load_file(directory / TENSOR_FILE)
    read: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        layer, _, matrix = key.removeprefix(PREFIX).rpartition(".lora_")
        if matrix == "A.weight":
            rank, alpha = (
                of_pattern(config[f"{kind}_pattern"], layer, config[default])
                for kind, default in (("rank", "r"), ("alpha", "lora_alpha"))
            )
            a, b = (_wide(tensors[f"{PREFIX}{layer}.lora_{letter}.weight"]) for letter in "AB")
            read[layer] = a, b.mT * (alpha / rank)
    return read


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


class _AdaptedLinear(nn.Module):
    """A layer and its adapter as a server runs them."""

    def __init__(self, layer: nn.Module, pair: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.layer, self.pair = layer, pair

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.pair is None:
            return y
        a, b = (matrix.to(y.device) for matrix in self.pair)
        return y + (x.to(a.dtype) @ a.mT @ b).to(y.dtype)


@torch.no_grad()
def _adapted_experts(name: str, plain: Any, read: dict[str, tuple[Tensor, Tensor]], family: Family) -> nn.Module:
    """A copy of the experts with the updates of the checkpoint in their weights; takes these out of ``read``."""
    merged = copy.deepcopy(plain)
    served = experts_name(name, family)
    if not any(key.startswith(f"{served}.") for key in read):
        return merged
    for projection in expert_projections(plain):
        for expert, weight in enumerate(getattr(merged, projection)):
            delta = _delta(served, expert, projection, plain, read, family)
            weight.copy_(weight + (delta.mT if plain.is_transposed else delta).to(weight.device))
    for key in [key for key in read if key == served or key.startswith(f"{served}.")]:
        del read[key]
    return merged


def _delta(
    served: str, expert: int, projection: str, experts: Any, read: Mapping[str, tuple[Tensor, Tensor]], family: Family
) -> Tensor:
    """``[N, K]``: what the checkpoint adds to a projection of one expert."""
    is_up = projection != "down_proj"
    if family.names is None:
        a, b = read[f"{served}.base_layer" if is_up else served]
        a, b = (t[expert] for t in expert_components(a, b.mT, len(experts.down_proj), swapped=False))
        return b.mT @ a
    deltas = []
    for leaf in family.names[:-1] if is_up else family.names[-1:]:
        a, b = read[f"{served}.{expert}.{leaf}"]
        deltas.append(b.mT @ a)
    if len(deltas) == 1 or experts.is_concatenated:
        return torch.cat(deltas)
    return torch.stack(deltas, 1).flatten(0, 1)
