"""What SGLang 0.5.23 does with an adapter directory, as far as it decides whether the adapter is served as trained.

Read in ``python/sglang/srt/lora/``: ``lora_config.py``, ``lora_manager.py`` (target modules), ``lora.py`` (stacking),
``mem_pool.py`` and ``utils.py`` (buffers and their sizes), ``layers.py`` (interleaved gates), and in ``srt/models/`` of
each family: the names of its linear layers and of the config entries that the buffers' sizes come from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests._checkpoint_names import expert_sizes, layer_sizes

# Layer of the served model -> the checkpoint's layers that it stacks.
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
NORMALIZED = {part: whole for whole, parts in STACKED.items() for part in parts}
# What get_hidden_dim knows, so that there is a buffer; nemotron_h has its own.
BUFFERED = {*STACKED, "o_proj", "down_proj", "q_b_proj", "kv_b_proj", "lm_head"}
SERVED = {
    *("llama", "qwen3", "gemma2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2"),
    *("deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "nemotron_h"),
}


class Refused(Exception):
    """SGLang raises, or ignores a part of the adapter."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


def load(directory: Path, hf: nn.Module) -> dict[str, Tensor]:
    """The update of each layer of the served model, by ``layer index.name``; experts as ``[E, N, K]``.

    Args:
        directory: The adapter, which is the server's only one: its target modules and rank are the server's.
        hf: The plain model of transformers, whose checkpoint the server has loaded.

    Raises:
        Refused: The adapter is not served as it is.
    """
    require(hf.config.model_type in SERVED, "the server does not adapt such a model")
    config = json.loads((directory / "adapter_config.json").read_text())
    require(config["peft_type"].lower() == "lora" and not config.get("use_dora"), "not a plain LoRA")
    require(isinstance(config["target_modules"], list), "target_modules must be a list")
    targets = {NORMALIZED.get(name.rpartition(".")[2], name) for name in config["target_modules"]}
    buffered = BUFFERED | ({"out_proj"} if hf.config.model_type == "nemotron_h" else set())
    require(targets <= buffered, f"get_hidden_dim not implemented for {sorted(targets - buffered)}")
    _require_mlp_buffers(hf, targets)
    layers: dict[int | None, dict[str, Tensor]] = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        match = re.search(r"layers\.(\d+)\.", key)
        require(match or "lm_head" in key, f"{key} is in no layer: ignored")
        layers.setdefault(int(match[1]) if match else None, {})[key] = tensor
    scaling, rank, served = config["lora_alpha"] / config["r"], config["r"], _served_sizes(hf)
    updates: dict[str, Tensor] = {}
    for index, weights in layers.items():
        updates |= _layer(index, _stacked(weights), targets, rank, scaling, served, hf)
    return updates


def _require_mlp_buffers(hf: nn.Module, targets: set[str]) -> None:
    """In a model with experts ``init_buffers`` makes buffers of other MLPs only for shared experts."""
    if not expert_sizes(hf) or not targets & {"gate_up_proj", "down_proj"}:
        return
    shared = (getattr(hf.config, key, 0) or 0 for key in ("shared_expert_intermediate_size", "n_shared_experts"))
    others = [n for n in layer_sizes(hf) if n.endswith((".gate_proj", ".up_proj")) and ".experts." not in n]
    require(any(shared) or not others, f"{others[:1]} has no buffer: KeyError")


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``LoRAAdapter._normalize_weights``."""
    weights = {name: _repeated(name, tensor) for name, tensor in weights.items()}
    names = [n for n in weights if "q_proj" in n]
    for name in names:
        others = [name.replace("q_proj", other) for other in ("k_proj", "v_proj")]
        require(all(other in weights for other in others), f"{name} without k_proj and v_proj: KeyError")
        weights[name.replace("q_proj", "qkv_proj")] = _cat(name, [weights.pop(n) for n in (name, *others)])
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        weights = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in weights.items()}
    gated = any("up_proj" in name and ".experts." in name for name in weights)
    for name in [n for n in weights if "gate_proj" in n]:
        up, whole = name.replace("gate_proj", "up_proj"), name.replace("gate_proj", "gate_up_proj")
        if ".experts." in name and not gated and up not in weights:  # experts without a gate
            weights[whole] = weights.pop(name)
        else:
            gate = weights.pop(name)
            weights[whole] = _cat(name, [gate, weights.pop(up, torch.zeros_like(gate))])
    for name in [n for n in weights if "q_a_proj" in n]:
        other = name.replace("q_a_proj", "kv_a_proj_with_mqa")
        first = weights.pop(name)
        weights[name.replace("q_a_proj", "fused_qkv_a_proj_with_mqa")] = _cat(
            name, [first, weights.pop(other, torch.zeros_like(first))]
        )
    return weights


def _repeated(name: str, tensor: Tensor) -> Tensor:
    """lora_A of a layer that the checkpoint has stacked already, as phi3's: it serves all parts."""
    whole = next((whole for whole in ("qkv_proj", "gate_up_proj") if f"{whole}.lora_A" in name), None)
    return tensor.repeat(len(STACKED[whole]), 1) if whole else tensor


def _cat(name: str, parts: list[Tensor]) -> Tensor:
    require(len({part.shape[1] for part in parts}) == 1, f"{name} and what is stacked with it: sizes must match")
    return torch.cat(parts)


def _layer(
    index: int | None, weights: dict, targets: set[str], rank: int, scaling: float, served: dict, hf: nn.Module
) -> dict[str, Tensor]:
    """``LoRAMemoryPool.load_lora_weight_to_buffer``: one slot for each name, whose sizes must be the buffer's."""
    slots: dict[str, dict[int | None, dict[str, Tensor]]] = {}
    for name, tensor in weights.items():
        fitting = [target for target in targets if target in name]
        require(fitting, f"{name} matches no target module: skipped")
        expert = re.search(r"experts\.(\d+)\.", name)
        require(not (expert and "shared_experts." in name), f"{name}: indexed shared expert")
        target = max(fitting, key=len) + ("_moe" if expert else "")
        own = slots.setdefault(target, {}).setdefault(int(expert[1]) if expert else None, {})
        letter = "A" if "lora_A" in name else "B"
        require(letter not in own, f"{name}: its buffer is taken by another layer's")
        own[letter] = tensor
    updates = {}
    for target, members in slots.items():
        key = f"{index}.{target}"
        require(key in served, f"{key} is no module of the model: ignored")
        count, inputs, parts = served[key]
        require(set(members) <= set(range(count) if count else [None]), f"{key}: there is no expert {max(members)}")
        products = {}
        for expert, own in members.items():
            require(len(own) == 2, f"{key} lacks a matrix")
            a, b = own["A"], own["B"]
            require(a.shape == (rank * len(parts), inputs), f"{key}: buffer {(rank * len(parts), inputs)}, A {a.shape}")
            require(b.shape == (sum(parts), rank), f"{key}: buffer {(sum(parts), rank)}, B {b.shape}")
            split = [scaling * y @ x for x, y in zip(a.split(rank), b.split(parts), strict=True)]
            interleaved = target == "gate_up_proj_moe" and hf.config.model_type == "gpt_oss"
            products[expert] = torch.stack(split, 1).flatten(0, 1) if interleaved else torch.cat(split)
        zeros = torch.zeros(sum(parts), inputs)  # what an expert gets that is not in the file
        updates[key] = torch.stack([products.get(e, zeros) for e in range(count)]) if count else products[None]
    return updates


def _served_sizes(hf: nn.Module) -> dict[str, tuple[int, int, list[int]]]:
    """By layer index and module: experts (0 for none), inputs, and outputs of the parts that it stacks.

    The sizes are those of the served weights: ``qkv_proj`` and the like from the config, MLPs from the layer itself.
    """
    sizes = layer_sizes(hf)
    served: dict[str, tuple[int, int, list[int]]] = {}
    for name, (outputs, inputs) in sizes.items():
        layer, leaf = re.search(r"layers\.(\d+)\.", name), name.rpartition(".")[2]
        if ".experts." in name or (not layer and leaf != "lm_head"):
            continue
        index, whole = (layer[1] if layer else None), NORMALIZED.get(leaf, leaf)
        parts = [name.removesuffix(leaf) + part for part in STACKED.get(whole, (leaf,))]
        if whole == leaf and whole in STACKED:  # fused in the checkpoint
            half = [outputs // 2] * 2
            cut = half if whole == "gate_up_proj" else _qkv(hf.config)
            served[f"{index}.{whole}"] = (0, inputs, cut)
        elif all(part in sizes for part in parts):
            served[f"{index}.{whole}"] = (0, inputs, [sizes[part][0] for part in parts])
    config_experts = next(
        (v for k in ("num_experts", "num_local_experts", "n_routed_experts") if (v := getattr(hf.config, k, 0))), 1
    )
    for index, (count, shape) in expert_sizes(hf).items():
        require(count == config_experts, f"{count} experts in buffers of {config_experts}")
        has_gate = shape["gate_up"][0] == 2 * shape["up"][0]
        served[f"{index}.gate_up_proj_moe"] = (count, shape["up"][1], [shape["up"][0]] * (2 if has_gate else 1))
        served[f"{index}.down_proj_moe"] = (count, shape["down"][1], [shape["down"][0]])
    return served


def _qkv(config) -> list[int]:
    return [config.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
