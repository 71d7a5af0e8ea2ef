"""What the formats of the servers share: a LoRA checkpoint with the names of the layers that a server's model has.

Servers adapt the layers that they know, and ignore or refuse what is not named as they name it. So each format lists
the model families that its server adapts, the layers of each, and the names of their experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lrlora_ops._checkpoint import write_tensors
from lrlora_ops._targets import matches
from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations._factors import Factors, all_factors
from lrlora_ops.integrations._peft_layout import CONFIG_FILE, PREFIX, TENSOR_FILE, expert_matrices
from lrlora_ops.modules._interface import expert_projections, is_experts

_LAYER = re.compile(
    r"model\.layers\.\d+\."
)  # what the servers call a decoder layer, as a CausalLM of transformers does
HEAD = ("lm_head",)
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")


def mlp(path: str = "mlp") -> tuple[str, ...]:
    """The layers of a gated MLP."""
    return tuple(f"{path}.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Family:
    """The layers of a ``model_type`` that a server adapts.

    Attributes:
        layers: Ends of the names of the linear layers.
        experts: The experts module within a decoder layer, as the server names it; "" for the name in transformers.
        names: Of the projections of one expert: gate, up and down, without the gate where experts have none. None where
            the server wants PEFT's fused layout.
    """

    layers: tuple[str, ...]
    experts: str = ""
    names: tuple[str, ...] | None = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Server:
    """How a server reads adapters.

    Attributes:
        name: With the version whose source the rules were read from.
        families: By ``model_type``.
        ranks: The ranks that are written, of those that the adapters have, by layer.
        groups: Layers of one parent that the server reads together: where one is adapted, all must be in the file.
    """

    name: str
    families: Mapping[str, Family]
    ranks: Callable[[Mapping[str, int]], dict[str, int]]
    groups: tuple[tuple[str, ...], ...] = ()

    def family(self, model: Any) -> Family:
        """Raises ValueError for a model that the server does not adapt."""
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        if model_type not in self.families:
            raise ValueError(
                f"{self.name} is not known to serve adapters of model_type {model_type!r}, only of "
                f"{', '.join(self.families)}; export format='merged', or format='peft' for other software"
            )
        return self.families[model_type]


def write(adapters: Adapters, directory: Path, server: Server) -> int:
    """Write a LoRA checkpoint that the server loads: ranks padded with zeros, ``lora_alpha == r``.

    Returns:
        The largest rank.

    Raises:
        ValueError: The server adapts no such model, or not one of its layers, or there is nothing to write.
    """
    family = server.family(adapters.model)
    found = all_factors(adapters, server.name)
    refused = [name for name in found if not _is_served(name, adapters.model, family)]
    if refused:
        raise ValueError(
            f"{server.name} takes no adapter on {', '.join(refused[:5])}{' and others' if refused[5:] else ''} of this "
            "model; leave what it does not take out of targets, or export format='merged'"
        )
    found.update(dict(_companions(adapters.model, found, server)))
    ranks = server.ranks({name: a.shape[1] for name, factors in found.items() for a, _ in factors.values()})
    tensors: dict[str, Tensor] = {}
    patterns: dict[int, list[str]] = {}
    for name, factors in found.items():
        for layer, pair in _matrices(name, adapters.model.get_submodule(name), _padded(factors, ranks[name]), family):
            for letter, matrix in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{layer}.lora_{letter}.weight"] = matrix.clone(memory_format=torch.contiguous_format)
        own = re.escape(name) if "" in factors else re.escape(experts_name(name, family)) + r"(\..+)?"
        patterns.setdefault(ranks[name], []).append(own)
    write_tensors(tensors, directory / TENSOR_FILE, {"format": "pt"})
    config = _config(patterns, list(tensors))
    config["base_model_name_or_path"] = getattr(adapters.model, "name_or_path", None) or None
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return max(patterns)


def _padded(factors: Factors, rank: int) -> Factors:
    return {
        key: (pad(a, (0, 0, 0, rank - a.shape[1])), pad(b, (0, 0, 0, rank - b.shape[1])))
        for key, (a, b) in factors.items()
    }


def _is_served(name: str, model: nn.Module, family: Family) -> bool:
    if not _LAYER.match(name):
        return name in family.layers
    return is_experts(model.get_submodule(name)) or any(matches(name, layer) for layer in family.layers)


def _companions(model: nn.Module, found: Mapping[str, Factors], server: Server) -> Iterator[tuple[str, Factors]]:
    """Zeros for the layers that the server reads together with an adapted one."""
    for name in found:
        parent, _, leaf = name.rpartition(".")
        for group in (group for group in server.groups if leaf in group):
            layers: dict[str, Any] = dict(model.get_submodule(parent).named_children())
            if group[0] not in layers:
                raise ValueError(
                    f"{server.name} takes no adapter on {name} beside which there is no {group[0]}; leave it out of "
                    "targets, or export format='merged'"
                )
            for other in group:
                if other in layers and f"{parent}.{other}" not in found:
                    a, b = (torch.zeros(1, 1, getattr(layers[other], f"{side}_features")) for side in ("in", "out"))
                    yield f"{parent}.{other}", {"": (a, b)}


def experts_name(name: str, family: Family) -> str:
    """What the server calls an experts module of transformers."""
    layer = _LAYER.match(name)
    return f"{layer[0]}{family.experts}" if layer and family.experts else name


def _matrices(name: str, host: Any, factors: Factors, family: Family) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Names of the served layers, and PEFT's matrices ``[r, K]`` and ``[N, r]`` of each."""
    if not is_experts(host):
        a, b = factors[""]
        yield name, (a[0], b[0].mT)
        return
    served = experts_name(name, family)
    (up_a, up_b), down = (factors[projection] for projection in expert_projections(host))
    if family.names is None:
        yield f"{served}.base_layer", expert_matrices(up_a, up_b, swapped=False)
        yield served, expert_matrices(*down, swapped=False)
        return
    parts = [*((up_a, b) for b in _halves(up_b, host)), down]
    for leaf, (a, b) in zip(family.names, parts, strict=True):
        for expert in range(len(a)):
            yield f"{served}.{expert}.{leaf}", (a[expert], b[expert].mT)


def _halves(b: Tensor, experts: Any) -> tuple[Tensor, ...]:
    """The rows of the gate and of the up projection, of ``[..., N]``; all of them where experts have no gate."""
    if not experts.has_gate:
        return (b,)
    return b.chunk(2, -1) if experts.is_concatenated else (b[..., ::2], b[..., 1::2])


def _config(patterns: Mapping[int, list[str]], keys: list[str]) -> dict[str, Any]:
    """PEFT's config; one pattern for each rank, since loaders try all patterns on each layer."""
    largest = max(patterns)
    pattern = {"|".join(own): rank for rank, own in patterns.items() if rank != largest}
    layers = {key.removeprefix(PREFIX).rsplit(".", 2)[0].removesuffix(".base_layer") for key in keys}
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "bias": "none",
        "inference_mode": True,
    }
