"""What the demo can compare, as data: a base model, how it is trained, and the arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from lrlora_ops import DynamicRank, FixedRank, LearnedRank, SincUpdate
from lrlora_ops.finetune.arm import Arm, ArmPlan
from lrlora_ops.finetune.controls import on_wrong_experts
from lrlora_ops.finetune.demo_texts import VOCAB_SIZE
from lrlora_ops.finetune.trainer import Recipe

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}

ControlPlan = Callable[[Sequence[Arm]], ArmPlan]  # from the arms that are trained already


@dataclass(frozen=True)
class Experiment:
    """A base model that is pretrained, and ways to fine-tune it that are compared.

    Attributes:
        config: Of a causal language model of transformers.
        tuning_rows: Rows of a fine-tuning batch from each of its two texts.
        pretraining, fine_tuning: Recipes; all arms have the same.
        plans: The arms, all with the same budget. The others are compared with the first.
        controls: Further arms, of any budget, each planned when the arms before it are trained.
    """

    config: PretrainedConfig
    tuning_rows: int
    pretraining: Recipe
    fine_tuning: Recipe
    plans: tuple[ArmPlan, ...]
    controls: tuple[ControlPlan, ...] = ()


def dense(seed: int) -> Experiment:
    """A Llama of 1 million parameters: fixed against learned ranks of its linear layers, and against fixed ranks with a
    learned function of each element, one for all layers.

    Every projection maps 128 features to 256 or 256 to 128, so equal sums of ranks are equal numbers of parameters,
    wherever the ranks are.
    """
    return Experiment(
        config=LlamaConfig(**SIZES, head_dim=64, intermediate_size=256),
        tuning_rows=2,
        pretraining=Recipe(500, 4e-3, betas=(0.9, 0.95), weight_decay=0.1),
        fine_tuning=Recipe(300, 8e-3),
        plans=(
            ArmPlan("FixedRank", lambda _: FixedRank(4)),
            ArmPlan("LearnedRank", lambda steps: LearnedRank(4, 16, steps, freeze=0.6, seed=seed)),
            ArmPlan("SincUpdate", lambda _: SincUpdate(4, share="global")),
        ),
    )


def mixture_of_experts(seed: int, controls: bool = False) -> Experiment:
    """A Qwen3-MoE of 2.8 million parameters in 4 layers of 16 experts, of which a token visits 2.

    Equal, growing and learned ranks of its experts, 8 in the mean. Its layers are balanced one by one in pretraining:
    transformers' balance loss, which pools them, leaves experts idle.

    Args:
        seed: Of the sampled ranks and of the control.
        controls: Add equal ranks of 16, and the ranks that DR-LoRA ends with, given to the wrong experts.
    """
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    return Experiment(
        config=Qwen3MoeConfig(**SIZES, **experts, head_dim=32, router_aux_loss_coef=0.0),
        tuning_rows=4,
        pretraining=Recipe(600, 4e-3, betas=(0.9, 0.95), weight_decay=0.1, balance=0.01),
        fine_tuning=Recipe(200, 8e-3),
        plans=(
            ArmPlan("uniform 8", lambda _: FixedRank(8), "experts"),
            ArmPlan("DR-LoRA", growing_ranks, "experts"),
            ArmPlan("LearnedRank", lambda steps: LearnedRank(8, 32, steps, seed=seed), "experts"),
        ),
        controls=(
            lambda _: ArmPlan("uniform 16", lambda _: FixedRank(16), "experts"),
            lambda arms: on_wrong_experts("DR permuted", arms[1], seed),
        )
        if controls
        else (),
    )


def growing_ranks(steps: int) -> DynamicRank:
    """DR-LoRA from rank 4 to 8 in the mean, by at most 5 at a time: of 200 steps, every 8 from step 10 to step 70."""
    first, last, interval = max(1, steps // 20), max(3, 7 * steps // 20), max(1, steps // 25)
    # The method's own schedule goes on until an interval before the end of the run that it is told of.
    told = last + interval
    return DynamicRank(4, 8, 32, told, interval, warmup=(first + 0.5) / told, gamma=1.2, grow_fraction=0.16)
