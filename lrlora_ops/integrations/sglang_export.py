"""Adapters become a LoRA checkpoint that SGLang serves; the rules are those of SGLang 0.5.23.

All modules have one rank, and layers that the server has in one must all be in the file. A family is left out if its
model has no LoRA, if the server takes its number of experts or the sizes of its layers from another config, or if it
always fuses shared with routed experts. A layer is left out if the server has no buffer of its name and size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations import _served, _served_check
from lrlora_ops.integrations._served import ATTENTION, HEAD, Family, Server, mlp
from lrlora_ops.modules import VariableRankLoRALinear
from lrlora_ops.modules._interface import is_experts

_LINEAR = (nn.Linear, VariableRankLoRALinear)
_DENSE = ATTENTION + mlp()
_LATENT = tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), Family(_DENSE + HEAD)),
    **dict.fromkeys(("gemma2", "gemma3_text"), Family(_DENSE)),
    "phi3": Family(("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *HEAD)),
    **dict.fromkeys(
        ("mixtral", "phimoe", "minimax_m2", "granitemoe", "qwen3_moe", "olmoe", "gpt_oss"), Family(ATTENTION + HEAD)
    ),
    "qwen2_moe": Family(ATTENTION + mlp("shared_expert") + HEAD),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), Family(_LATENT + mlp() + mlp("shared_experts") + HEAD)),
    "glm4_moe": Family(_DENSE + mlp("shared_experts") + HEAD),
    "nemotron_h": Family(
        (*(f"mixer.{name}_proj" for name in ("q", "k", "v", "o", "out")), "shared_experts.down_proj", *HEAD),
        names=("gate_proj", "down_proj"),  # of experts without a gate it takes the first projection by this name
    ),
}


def _uniform(ranks: Mapping[str, int]) -> dict[str, int]:
    return dict.fromkeys(ranks, max(ranks.values()))


SERVER = Server(
    "SGLang 0.5.23",
    FAMILIES,
    _uniform,
    groups=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")),
)


def write(adapters: Adapters, directory: Path) -> None:
    """See ``_served.write``.

    Raises:
        ValueError: Also where dense MLPs beside the experts would have no buffers in the server.
    """
    _served.write(adapters, directory, SERVER)
    _require_buffers(adapters)
    config: Any = adapters.model.config
    if config.model_type.startswith("deepseek"):
        print(f"{SERVER.name} adapts the experts of DeepSeek models with --disable-shared-experts-fusion only")


def check(adapters: Adapters, directory: Path) -> float:
    """See ``_served_check.check``."""
    return _served_check.check(adapters, directory, SERVER)


def _require_buffers(adapters: Adapters) -> None:
    """In a model with experts the server has buffers for other MLPs only if its config tells of shared experts."""
    model: Any = adapters.model
    config = getattr(model, "config", None)
    shared = max(getattr(config, key, 0) or 0 for key in ("shared_expert_intermediate_size", "n_shared_experts"))
    if shared or not any(is_experts(module) for module in model.modules()):
        return
    ends = mlp("")
    dense = [name for name, module in model.named_modules() if name.endswith(ends) and isinstance(module, _LINEAR)]
    live = [name for name, module in adapters.modules.items() if int(module.table.ranks.max())]
    adapted = [name for name in live if name.endswith(ends) or is_experts(model.get_submodule(name))]
    if dense and adapted:
        raise ValueError(
            f"{SERVER.name} cannot adapt {adapted[0]} of a model with experts that also has MLPs without, such as "
            f"{dense[0]}; leave experts and MLPs out of targets, or export format='merged'"
        )
