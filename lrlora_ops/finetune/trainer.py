"""The training loop: of the demo's pretraining and of every fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lrlora_ops import Adapters
from lrlora_ops.finetune.errors import CommandError


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over 5% of the steps, then a cosine down to 10% of ``lr``."""

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    recipe: Recipe,
    on_step: Callable[[float], None],
    adapters: Adapters | None = None,
) -> None:
    """Train the adapters, or without any the whole model, on each batch once.

    Args:
        model: A causal language model of transformers; left in training mode.
        batches: int64 ``[rows, tokens]`` each, ``recipe.steps`` of them.
        recipe: Optimizer and schedule.
        on_step: Called with the loss after every step.
        adapters: Their ranks move with every step, and they are compacted once the ranks are final.

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
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
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
