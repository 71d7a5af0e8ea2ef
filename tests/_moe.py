"""Tiny random Mixture-of-Experts models of transformers, and adapters on their experts that do something."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from lrlora_ops import Adapters, DynamicRank, FixedRank, VariableRankLoRAExperts, apply_lora
from lrlora_ops.modules._adapter import RankAdapter

NUM_EXPERTS = 4
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # with 0.02 a broken adapter moves the logits by less than rounding
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
LOCAL = {"num_local_experts": NUM_EXPERTS}
NAMED = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 8}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
GROUPED = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
ROUTED = {"n_routed_experts": NUM_EXPERTS, "moe_intermediate_size": 8}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 2,
}
ERNIE = {"moe_num_experts": NUM_EXPERTS, "moe_k": 2, "moe_intermediate_size": 8}
HYBRID = {
    "n_groups": 1,
    "ssm_state_size": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "chunk_size": 4,
    "moe_shared_expert_intermediate_size": 12,
}
# What each model is here for, beyond its router and its attention.
MODELS = {
    "mixtral": LOCAL,
    "qwen2_moe": NAMED | {"shared_expert_intermediate_size": 12},  # a shared expert of plain linear layers
    "qwen3_moe": NAMED,
    "olmoe": {"num_experts": NUM_EXPERTS},
    "phimoe": LOCAL | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "deepseek_v2": MLA | GROUPED | ROUTED,  # the first layer is dense
    "deepseek_v3": MLA | GROUPED | ROUTED,
    "glm4_moe": GROUPED | ROUTED,
    "gpt_oss": LOCAL,  # transposed, interleaved, biases, a clamped gate
    "granitemoe": LOCAL,
    "lfm2_moe": NAMED | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": NAMED
    | LINEAR_ATTENTION
    | {"shared_expert_intermediate_size": 12, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": LOCAL,
    "ernie4_5_moe": ERNIE,
    "hunyuan_v1_moe": {"num_experts": NUM_EXPERTS, "moe_topk": 2},
    "aria_text": {"moe_num_experts": NUM_EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},  # transposed
    "nemotron_h": ROUTED | HYBRID | {"layers_block_type": ["mamba", "moe", "attention", "moe"]},  # no gate
    "muse_spark_text": LOCAL | {"moe_intermediate_size": 8, "moe_hidden_size": 12},  # a norm after the experts
    "openai_privacy_filter": LOCAL,
    "dots1": GROUPED | ROUTED,
    "flex_olmo": {"num_experts": NUM_EXPERTS},
}


CLASSES = {
    "muse_spark_text": transformers.MuseSparkTextModel._from_config,
    "openai_privacy_filter": transformers.AutoModelForTokenClassification.from_config,
}
METHODS = {
    # A pool that the experts share: 3 components each on the average.
    "experts": DynamicRank(initial_rank=2, target_rank=3, max_rank=6, total_steps=1000),
    "all-linear": FixedRank(2),
}
RANKS = [3, 0, 6, 2]


def tiny(name: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A model of random weights in evaluation mode, for ids of 0..39; dense if its name is not in ``MODELS``."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **COMMON | MODELS.get(name, {}) | options)
    return CLASSES.get(name, transformers.AutoModelForCausalLM.from_config)(config).to(dtype).eval()


def ids(rows: int = 4) -> Tensor:
    return torch.randint(3, 40, (rows, 6), generator=torch.Generator().manual_seed(0))


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model that has no head."""
    result = model(input_ids=x, use_cache=False)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def adapted(model: nn.Module, targets: str | list[str] = "experts") -> Adapters:
    """Experts of the ranks ``RANKS``, whose components lie in no order; what nobody owns is NaN."""
    patterns = [targets] if isinstance(targets, str) else targets
    methods = {pattern: METHODS.get(pattern, METHODS["all-linear"]) for pattern in patterns}
    dtype = next(model.parameters()).dtype
    adapters = apply_lora(model, methods, targets, dtype=dtype)
    torch.manual_seed(1)
    for module in adapters.modules.values():
        if isinstance(module, VariableRankLoRAExperts):
            for ranks in ([0, 4, 4, 4], [2, 6, 0, 4], RANKS):
                module.set_ranks(ranks)
        fill(module)
    return adapters


@torch.no_grad()
def fill(adapter: RankAdapter) -> None:
    """Updates of the size of the weights, and NaN in all pool rows that no expert owns."""
    owned = torch.cat([adapter.table.rows_of(expert) for expert in range(adapter.table.num_experts)])
    dead = torch.ones(adapter.table.pool_size, dtype=torch.bool)
    dead[owned] = False
    for pool in adapter.pools().values():
        pool.lora_B.normal_(std=0.3)
        for parameter in (pool.lora_A, pool.lora_B):
            parameter[dead] = torch.nan
