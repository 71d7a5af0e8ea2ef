"""What vLLM 0.33.0 does with an adapter directory, as far as it decides whether the adapter is served as trained.

Read in ``vllm/lora/``: ``peft_helper.py`` (config), ``lora_model.py`` and ``utils.py`` (names), ``model_manager.py``
and ``lora_weights.py`` (packing), ``layers/`` (shapes); in ``vllm/config/lora.py`` (ranks); and in
``vllm/model_executor/models/`` of each family: the names of its linear layers, its ``packed_modules_mapping``,
``embedding_modules`` and ``hf_to_vllm_mapper``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests._checkpoint_names import expert_sizes, layer_sizes

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
QKV, GATE_UP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
HEAD = {"lm_head", "embed_tokens"}
DENSE = QKV | GATE_UP | {"o_proj", "down_proj"}
LATENT = {"q_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj", "gate"}
W123 = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Model:
    """A model class of vLLM.

    Attributes:
        leaves: Last parts of the names that the loader expects: linear layers, packed ones by their parts.
        experts: Of one expert, the checkpoint's names of gate, down and up projection; without up for no gate.
        block: The experts' path in a decoder layer.
        renames: The mapper: parts of a name, and what stands in the model for them.
        three_d: ``is_3d_moe_weight``.
        absorbed: Layers whose weight is read without a call, so that an adapter there is lost.
    """

    leaves: set[str]
    experts: tuple[str, ...] = ("gate_proj", "down_proj", "up_proj")
    block: str = "mlp.experts"
    renames: dict[str, str] = field(default_factory=dict)
    three_d: bool = False
    absorbed: tuple[str, ...] = ()


SPARSE = {"experts": W123, "block": "block_sparse_moe.experts"}
MODELS = {
    "llama": Model(DENSE | HEAD),
    "qwen3": Model(DENSE | HEAD),
    "gemma2": Model(DENSE),
    "phi3": Model({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} | HEAD),
    "mixtral": Model(
        QKV | HEAD | {"o_proj", "gate"},
        **SPARSE,
        renames={".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
    ),
    "phimoe": Model(QKV | HEAD | {"o_proj", "gate"}, **SPARSE),
    "minimax_m2": Model(QKV | {"o_proj", "gate"}, **SPARSE),
    "granitemoe": Model(QKV | HEAD | {"o_proj", "gate"}, block="block_sparse_moe.experts"),
    "qwen2_moe": Model(DENSE | {"gate", "shared_expert_gate"}),
    "qwen3_moe": Model(QKV | HEAD | {"o_proj", "gate"}),
    "olmoe": Model(QKV | {"o_proj", "gate"}),
    "deepseek_v2": Model(GATE_UP | LATENT | {"down_proj"}, absorbed=("kv_b_proj",)),
    "deepseek_v3": Model(GATE_UP | LATENT | {"down_proj"}, absorbed=("kv_b_proj",)),
    "glm4_moe": Model(DENSE | {"gate"}),
    "ernie4_5_moe": Model(DENSE | {"gate"}),
    "qwen3_next": Model(DENSE | {"gate", "shared_expert_gate", "in_proj_qkvz", "in_proj_ba", "conv1d", "out_proj"}),
    "gpt_oss": Model(QKV | {"o_proj", "router"}, renames={".self_attn.": ".attn."}, three_d=True),
    "lfm2_moe": Model(
        QKV | HEAD | {"out_proj", "in_proj", "w1", "w3", "w2", "gate", "conv"},
        experts=W123,
        block="feed_forward.experts",
        renames={".conv.": ".short_conv."},
    ),
    "nemotron_h": Model(
        QKV | HEAD | {"o_proj", "in_proj", "out_proj", "conv1d", "up_proj", "down_proj", "gate"},
        experts=("up_proj", "down_proj"),
        block="mixer.experts",
        renames={"backbone.": "model."},
    ),
}


class Refused(Exception):
    """vLLM raises, or ignores a part of the adapter."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


def load(directory: Path, hf: nn.Module, max_lora_rank: int) -> dict[str, Tensor]:
    """The update of each layer of the served model, under the layer's name there; experts as ``[E, N, K]``, gate and up
    apart, or together in the order of the fused parameter.

    Args:
        directory: The adapter.
        hf: The plain model of transformers, whose checkpoint the server has loaded.
        max_lora_rank: The server's option.

    Raises:
        Refused: The adapter is not served as it is.
    """
    require(max_lora_rank in MAX_LORA_RANKS, f"max_lora_rank is one of {MAX_LORA_RANKS}")
    model = MODELS[hf.config.model_type]
    config = _config(directory, max_lora_rank)
    pairs = _pairs(directory, config, model)
    sizes = {_renamed(name, model): size for name, size in layer_sizes(hf).items()}
    updates = {}
    for name, count, shape in _expert_modules(hf, model):
        if model.three_d:
            updates |= _fused_experts(name, count, shape, pairs)
        else:
            updates |= _packed_experts(name, count, shape, pairs, model)
    for name in list(pairs):
        require(name in sizes, f"{name} is no layer of the model: silently ignored")
        require(not name.endswith(model.absorbed or ("?",)), f"{name} is read without a call: silently ignored")
        updates[name] = _product(*pairs.pop(name), sizes[name], max_lora_rank)
    return updates


def _config(directory: Path, max_lora_rank: int) -> dict:
    config = json.loads((directory / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "target_modules"):
        require(key in config, f"Missing required configuration fields: {key}")
    for key in (
        "modules_to_save",
        "use_dora",
        "lora_bias",
        "alora_invocation_tokens",
        "layer_replication",
        "use_qalora",
    ):
        require(not config.get(key), f"vLLM does not support {key}")
    require(config.get("bias", "none") == "none", "Adapter bias is not supported")
    require(not isinstance(config.get("init_lora_weights"), str), "init_lora_weights changes the base model")
    ranks = [config["r"], *config.get("rank_pattern", {}).values()]
    require(all(isinstance(rank, int) and rank > 0 for rank in ranks), "LoRA rank must be a positive integer")
    require(max(ranks) <= max_lora_rank, f"LoRA rank {max(ranks)} is greater than max_lora_rank {max_lora_rank}")
    return config


def _of_pattern(pattern: dict, name: str, default: float) -> float:
    if name.endswith(".experts.base_layer"):
        name = name.removesuffix("base_layer") + "gate_up_proj"
    elif name.endswith(".experts"):
        name += ".down_proj"
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _pairs(directory: Path, config: dict, model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and scaled lora_B by the name in the model."""
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        require(match, f"{key} is unsupported LoRA weight")
        name = _renamed(match[1] + ".", model)[:-1]
        if "base_layer" not in key:
            _require_expected(name, model)
        rank, alpha = (
            _of_pattern(config.get(f"{kind}_pattern") or {}, match[1], config[default])
            for kind, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        matrices.setdefault(name, {})[match[2]] = tensor * (alpha / rank) if match[2] == "lora_B" else tensor
    for name, own in matrices.items():
        require(len(own) == 2, f"{name} lacks a matrix")
    return {name: (own["lora_A"], own["lora_B"]) for name, own in matrices.items()}


def _require_expected(name: str, model: Model) -> None:
    if ".experts" in name:
        suffix = name[name.index(".experts") + 1 :]
        known = re.fullmatch(rf"experts\.\d+\.({'|'.join(model.experts)})", suffix) and not model.three_d
        require(known or suffix == "experts", f"expected target modules, but received {name}")
    else:
        require(name.rpartition(".")[2] in model.leaves, f"expected target modules, but received {name}")


def _renamed(name: str, model: Model) -> str:
    for old, new in model.renames.items():
        name = name.replace(old, new)
    return name


def _expert_modules(hf: nn.Module, model: Model) -> list[tuple[str, int, dict[str, tuple[int, int]]]]:
    """Name in the served model, number of experts, and by projection outputs and inputs."""
    return [(f"model.layers.{layer}.{model.block}", *sizes) for layer, sizes in expert_sizes(hf).items()]


def _packed_experts(name: str, count: int, shape: dict, pairs: dict, model: Model) -> dict[str, Tensor]:
    """``PackedLoRALayerWeights.pack_moe`` and ``FusedMoEWithLoRA.set_lora``."""
    own = [f"{name}.{expert}.{leaf}" for expert in range(count) for leaf in model.experts]
    require(name not in pairs, f"{name}: fused 3D weights for a 2D wrapper")
    if not any(key in pairs for key in own):
        return {}
    for key in own:
        require(key in pairs, f"{key} is missing: every expert needs all projections")
    updates = {}
    projections = ("gate", "down", "up") if len(model.experts) == 3 else ("up", "down")
    for leaf, projection in zip(model.experts, projections, strict=True):
        members = [pairs.pop(f"{name}.{expert}.{leaf}") for expert in range(count)]
        require(len({a.shape[0] for a, _ in members}) == 1, f"The experts of {name} have different LoRA ranks")
        updates[f"{name}.{projection}"] = torch.stack([_product(a, b, shape[projection]) for a, b in members])
    return updates


def _fused_experts(name: str, count: int, shape: dict, pairs: dict) -> dict[str, Tensor]:
    """``_stack_moe_lora_weights`` and ``FusedMoE3DWithLoRA.set_lora``."""
    if name not in pairs and f"{name}.base_layer" not in pairs:
        return {}
    require(name in pairs and f"{name}.base_layer" in pairs, f"{name} needs gate_up_proj and down_proj")
    updates = {}
    for key, projection in ((f"{name}.base_layer", "gate_up"), (name, "down")):
        a, b = pairs.pop(key)
        require(a.shape[0] % count == 0 and a.shape[0] == b.shape[1], f"{key} is not of {count} experts")
        a, b = a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
        updates[f"{name}.{projection}"] = torch.stack([_product(*m, shape[projection]) for m in zip(a, b, strict=True)])
    return updates


def _product(a: Tensor, b: Tensor, size: tuple[int, int], max_lora_rank: int = MAX_LORA_RANKS[-1]) -> Tensor:
    require(a.shape[0] == b.shape[1] <= max_lora_rank, f"ranks {a.shape[0]} and {b.shape[1]} of {max_lora_rank}")
    require((b.shape[0], a.shape[1]) == size, f"matrices of a layer {(b.shape[0], a.shape[1])}, which is {size}")
    return b @ a
