"""The training loop: of the demo's pretraining and of every fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lrlora_ops import Adapters
from lrlora_ops.finetune.errors import CommandError


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over 5% of the steps, then a cosine down to 10% of ``lr``.

    Attributes:
        balance: Weight of the load-balancing loss of each Mixture-of-Experts layer; 0 for none.
    """

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    balance: float = 0.0


def batch_loss(model: nn.Module, batch: Tensor, balance: float = 0.0) -> Tensor:
    """Cross entropy of the next token, plus ``balance`` times the sum of the layers' load-balancing losses.

    Args:
        model: A causal language model of transformers; with ``balance`` one of experts, its own
            ``router_aux_loss_coef`` 0.
        batch: int64 ``[rows, tokens]``.
        balance: transformers' balance loss pools all layers, which lets one make up for another; this one does not.
    """
    if not balance:
        return model(input_ids=batch, labels=batch).loss
    config: Any = model.config
    sizes = config.num_experts, config.num_experts_per_tok
    output = model(input_ids=batch, labels=batch, output_router_logits=True)
    return output.loss + balance * sum(load_balancing_loss_func((logits,), *sizes) for logits in output.router_logits)


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    recipe: Recipe,
    on_step: Callable[[float], None],
    adapters: Adapters | None = None,
    on_backward: Callable[[], None] = lambda: None,
) -> None:
    """Train the adapters, or without any the whole model, on each batch once.

    Args:
        model: A causal language model of transformers; left in training mode.
        batches: int64 ``[rows, tokens]`` each, ``recipe.steps`` of them.
        recipe: Optimizer and schedule.
        on_step: Called with the loss after every step.
        adapters: Their ranks move with every step, and they are compacted once the ranks are final.
        on_backward: Called in every step before the ranks move, which clears the sensitivities.

    Raises:
        CommandError: The loss is not finite any more.
    """
    parameters = list(model.parameters()) if adapters is None else adapters.parameters()
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
    warmup = max(1, recipe.steps // 20)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, recipe.steps, min_lr_rate=0.1)
    model.train()
    compacted = adapters is None
    for step, batch in enumerate(batches):
        batch = batch.to(device)
        loss = batch_loss(model, batch, recipe.balance)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        on_backward()
        if adapters is not None:
            adapters.step(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if adapters is not None and not compacted and all(policy.frozen for policy in adapters.policies):
            adapters.compact(optimizer)
            compacted = True
        value = loss.item()
        if not math.isfinite(value):
            raise CommandError(f"the loss is {value} at step {step}: lower the learning rate")
        on_step(value)
