"""Stock LoRA checkpoints of Hugging Face PEFT become adapters, which any method can train on. PEFT is not needed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lrlora_ops._targets import choose_methods, find_targets
from lrlora_ops.adapters import Adapters
from lrlora_ops.apply import apply_methods
from lrlora_ops.integrations._peft_layout import (
    CONFIG_FILE,
    PREFIX,
    TENSOR_FILE,
    expert_components,
    is_swapped,
    of_pattern,
)
from lrlora_ops.methods import FixedRank, Method
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._interface import expert_features, expert_projections, is_experts

# What a config says beside what is read here, and does not change what its tensors mean.
_HARMLESS = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "ensure_weight_tying"),
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "bias"),
}
# They change the base weights, which a LoRA checkpoint does not hold.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_MERGE = "merge it with PEFT's merge_and_unload, and adapt the merged model"
_THE_MODEL = "load the model that the checkpoint was trained on"


@dataclass(frozen=True)
class Factors:
    """One projection's update, ``scaling * B^T A`` of each expert: a ``[E, r, K]`` and b ``[E, r, N]``."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def load(model: nn.Module, path: Path, method: Method | Mapping[str, Method] | None) -> Adapters:
    """See ``lrlora_ops.load_adapter``."""
    config, tensors = _read(path)
    _refuse(config)
    found = _factors(model, config, tensors)
    ranks = {name: max(factors.rank for factors in projections.values()) for name, projections in found.items()}
    layers = find_targets(model, list(found))
    served: list[tuple[Method, list[str]]]
    if method is None:
        served = [(FixedRank(rank), [n for n in layers if ranks[n] == rank]) for rank in sorted(set(ranks.values()))]
    else:
        served = choose_methods(layers, method)
    for chosen, names in served:
        for name in names:
            if chosen.initial_rank < ranks[name]:
                raise ValueError(
                    f"{name} has rank {ranks[name]} in the checkpoint, and the method starts with "
                    f"{chosen.initial_rank}; raise the method's initial rank"
                )
    adapters = apply_methods(model, layers, served)
    for name, projections in found.items():
        _fill(adapters.modules[name], projections)
        if "" in projections:  # PEFT's experts have no dropout
            adapters.modules[name].dropout = float(config.get("lora_dropout") or 0.0)
    return adapters


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} holds no {file}; give the directory that PEFT's save_pretrained wrote")
    try:
        return json.loads((path / CONFIG_FILE).read_text()), load_file(path / TENSOR_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); load another checkpoint") from error


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises ValueError for what plain LoRA cannot represent."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"the checkpoint is of PEFT's method {config.get('peft_type')!r}; only LORA can be loaded: {_MERGE}"
        )
    settings = {name: value for name, value in config.items() if name not in _HARMLESS and value}
    if settings.get("init_lora_weights") in _HARMLESS_INITS:
        settings.pop("init_lora_weights", None)
    if config.get("bias", "none") != "none":
        settings["bias"] = config["bias"]
    if settings:
        raise ValueError(
            f"the checkpoint has {', '.join(f'{name}={value!r}' for name, value in settings.items())}, which plain "
            f"LoRA cannot represent; {_MERGE}"
        )


def _factors(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Factors]]:
    """By layer and projection, "" for linear layers."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"the checkpoint holds {key}, which is not a LoRA matrix; {_MERGE}")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    found: dict[str, dict[str, Factors]] = {}
    for wrapped, pair in pairs.items():
        name = wrapped.replace(".base_layer", "")
        try:
            layer, (a, b) = model.get_submodule(name), (pair["A"], pair["B"])
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"{wrapped} of the checkpoint has no layer in this model, or lacks a matrix; {_THE_MODEL}"
            ) from error
        if is_experts(layer):
            projection = _projection(name, layer, wrapped.count(".base_layer"), config)
            found.setdefault(name, {})[projection] = _of_experts(
                f"{name}.{projection}", layer, projection, a, b, config
            )
        else:
            found.setdefault(name, {})[""] = _of_linear(name, layer, a, b, config)
    return found


def _projection(name: str, experts: Any, depth: int, config: Mapping[str, Any]) -> str:
    """Which parameter a wrapper adapts: PEFT wraps them in their order, so that the last is the outermost."""
    own = [parameter for parameter, _ in experts.named_parameters(recurse=False)]
    wrapped = [parameter for parameter in own if _is_target(f"{name}.{parameter}", config)]
    adaptable = expert_projections(experts)
    if depth >= len(wrapped) or wrapped[-1 - depth] not in adaptable:
        raise ValueError(
            f"{name}: of its parameters {adaptable} can be adapted, and target_parameters are "
            f"{config.get('target_parameters')}; {_MERGE}"
        )
    return wrapped[-1 - depth]


def _is_target(parameter: str, config: Mapping[str, Any]) -> bool:
    return any(f".{parameter}".endswith(f".{target}") for target in config.get("target_parameters") or ())


def _of_experts(name: str, experts: Any, projection: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> Factors:
    num_experts, features = getattr(experts, projection).shape[0], expert_features(experts, projection)
    try:
        swapped = is_swapped(a.shape[1], *features, experts.is_transposed, config.get("peft_version"))
        components = expert_components(a, b, num_experts, swapped)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name} does not fit the checkpoint: {error}; {_THE_MODEL}") from error
    return _checked(name, *components, *features, config)


def _of_linear(name: str, layer: Any, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> Factors:
    in_features, out_features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    target = f"{name}.weight" if _is_target(f"{name}.weight", config) else name
    return _checked(target, a[None], b.t()[None], in_features, out_features, config)


def _checked(
    name: str, a: Tensor, b: Tensor, in_features: int | None, out_features: int | None, config: Mapping[str, Any]
) -> Factors:
    rank = a.shape[1]
    if (a.shape[2], b.shape[2], b.shape[1]) != (in_features, out_features, rank):
        raise ValueError(
            f"{name} maps {in_features} to {out_features} features, and the checkpoint's matrices are of rank {rank} "
            f"and {b.shape[1]} and map {a.shape[2]} to {b.shape[2]}; {_THE_MODEL}"
        )
    alpha = of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


@torch.no_grad()
def _fill(module: RankAdapter, projections: Mapping[str, Factors]) -> None:
    """Write the components into the first slots of each expert; the others have ``b = 0``."""
    module.scaling = next(iter(projections.values())).scaling
    module.lora_alpha = module.scaling * module.max_rank
    pools = module.pools()
    for projection, factors in projections.items():
        pool, relative = pools[projection], factors.scaling / module.scaling if module.scaling else 1.0
        for expert, (a, b) in enumerate(zip(factors.a, factors.b, strict=True)):
            rows = module.table.rows_of(expert)[: factors.rank]
            pool.lora_A[rows] = a.to(pool.lora_A)
            pool.lora_B[rows] = relative * b.to(pool.lora_B)
