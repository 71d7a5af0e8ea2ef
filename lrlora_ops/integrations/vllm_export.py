"""Adapters become a LoRA checkpoint that vLLM serves; the rules are those of vLLM 0.33.0.

Each module has a rank of its own, all experts of a module the same one, and each rank is one that ``--max-lora-rank``
can be. A family is left out if its model has no LoRA or runs through the transformers backend; a layer, if the server's
model has none of that name, or reads its weight without calling it, as latent attention does with ``kv_b_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations import _served, _served_check
from lrlora_ops.integrations._served import ATTENTION, HEAD, Family, Server, mlp

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LATENT = tuple(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"))
_DENSE = ATTENTION + mlp()
_SHARED = (*mlp("shared_expert"), "mlp.shared_expert_gate")
_OLD = ("w1", "w3", "w2")
_SPARSE_BLOCK = "block_sparse_moe.experts"

FAMILIES = {
    **dict.fromkeys(("llama", "qwen3", "granite"), Family(_DENSE + HEAD)),
    **dict.fromkeys(("mistral", "qwen2", "gemma2", "gemma3_text"), Family(_DENSE)),
    "phi3": Family(("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *HEAD)),
    "mixtral": Family(ATTENTION + HEAD, _SPARSE_BLOCK, _OLD),
    "phimoe": Family(ATTENTION + HEAD, _SPARSE_BLOCK, _OLD),
    "minimax_m2": Family(ATTENTION, _SPARSE_BLOCK, _OLD),
    "granitemoe": Family(ATTENTION + HEAD, _SPARSE_BLOCK),
    "qwen2_moe": Family(ATTENTION + _SHARED),
    "qwen3_moe": Family(ATTENTION + HEAD),
    "olmoe": Family(ATTENTION),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), Family(_LATENT + mlp() + mlp("shared_experts"))),
    **dict.fromkeys(("glm4_moe", "ernie4_5_moe"), Family(_DENSE + mlp("shared_experts"))),
    "qwen3_next": Family(
        (*ATTENTION, *_SHARED, *(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")))
    ),
    "gpt_oss": Family(ATTENTION, names=None),
    "lfm2_moe": Family(
        (
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            *("conv.in_proj", "conv.out_proj"),
            *(f"feed_forward.{name}" for name in _OLD),
            *HEAD,
        ),
        names=_OLD,
    ),
    "nemotron_h": Family(
        (
            *(f"mixer.{name}_proj" for name in ("q", "k", "v", "o", "in", "out", "up", "down")),
            *("shared_experts.up_proj", "shared_experts.down_proj"),
            *HEAD,
        ),
        names=("up_proj", "down_proj"),
    ),
}


def _accepted(ranks: Mapping[str, int]) -> dict[str, int]:
    accepted = {}
    for name, rank in ranks.items():
        fitting = [candidate for candidate in MAX_LORA_RANKS if candidate >= rank]
        if not fitting:
            raise ValueError(
                f"{name} has rank {rank}, and {SERVER.name} serves ranks up to {MAX_LORA_RANKS[-1]}; lower the "
                "method's max_rank, or export format='merged'"
            )
        accepted[name] = fitting[0]
    return accepted


SERVER = Server("vLLM 0.33.0", FAMILIES, _accepted)


def write(adapters: Adapters, directory: Path) -> None:
    """See ``_served.write``."""
    rank = _served.write(adapters, directory, SERVER)
    print(f"{SERVER.name} serves it with --enable-lora --max-lora-rank {rank} or more")


def check(adapters: Adapters, directory: Path) -> float:
    """See ``_served_check.check``."""
    return _served_check.check(adapters, directory, SERVER)
