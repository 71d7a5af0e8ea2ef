"""The training loop: of the demo's pretraining and of every fine-tuning."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lrlora_ops import Adapters
from lrlora_ops.finetune.errors import Diverged
from lrlora_ops.finetune.tokens import inputs_and_labels


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
        batch: int64 ``[rows, tokens]``, what is not to be predicted as ``~token``.
        balance: transformers' balance loss pools all layers, which lets one make up for another; this one does not.
    """
    input_ids, labels = inputs_and_labels(batch)
    if not balance:
        return model(input_ids=input_ids, labels=labels).loss
    config: Any = model.config
    sizes = config.num_experts, config.num_experts_per_tok
    output = model(input_ids=input_ids, labels=labels, output_router_logits=True)
    return output.loss + balance * sum(load_balancing_loss_func((logits,), *sizes) for logits in output.router_logits)


class Trainer:
    """Trains the adapters, or without any the whole model, step by step.

    Attributes:
        device: Of what is trained.
        steps: How many were made.
        whole: Whether what is here is what the last step left; False amid an update.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, adapters: Adapters | None = None) -> None:
        """
        Args:
            model: A causal language model of transformers; left in training mode.
            recipe: Optimizer and schedule.
            adapters: Their ranks move with every step, and they are compacted once the ranks are final.
        """
        self.model, self.recipe, self.adapters = model, recipe, adapters
        self.parameters = list(model.parameters()) if adapters is None else adapters.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
        warmup = max(1, recipe.steps // 20)
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer, warmup, recipe.steps, min_lr_rate=0.1
        )
        self.device = self.parameters[0].device
        self.steps, self.whole, self._compacted = 0, True, adapters is None
        model.train()

    def step(self, batch: Tensor, on_backward: Callable[[], None] = lambda: None) -> float:
        """One step on a batch, int64 ``[rows, tokens]``; returns its loss.

        ``on_backward`` is called before the ranks move, which clears the sensitivities.

        Raises:
            Diverged: The loss or its gradient is not finite any more; nothing is changed then.
        """
        loss = batch_loss(self.model, batch.to(self.device), self.recipe.balance)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        value = loss.item()
        for name, number in (("loss", value), ("norm of the gradient", norm.item())):
            if not math.isfinite(number):
                lower = f"lower the learning rate, {self.recipe.lr:g}"
                raise Diverged(f"the {name} is {number} at step {self.steps}: {lower}")
        on_backward()
        self.whole = False
        if self.adapters is not None:
            self.adapters.step(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.adapters is not None and not self._compacted and all(p.frozen for p in self.adapters.policies):
            self.adapters.compact(self.optimizer)
            self._compacted = True
        self.steps += 1
        self.whole = True
        return value

    def run(
        self,
        batches: Iterable[Tensor],
        on_step: Callable[[float], None],
        on_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """A step on each batch, in it ``on_backward``, and after it ``on_step`` with its loss.

        Raises:
            Diverged: As ``step`` does.
            KeyboardInterrupt: The user pressed Ctrl-C; it is raised once the step is done, at the second one at once.
        """
        with _interrupted_between_steps() as between:
            for batch in batches:
                on_step(self.step(batch, on_backward))
                between()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the adapters: the optimizer, and where it stands."""
        return {
            "steps": self.steps,
            "compacted": self._compacted,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, once the adapters are loaded."""
        self.steps, self._compacted = state["steps"], state["compacted"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@contextmanager
def _interrupted_between_steps() -> Iterator[Callable[[], None]]:
    """A first Ctrl-C waits for the call of what this yields, so that no step is left half done."""
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def between() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # it alone gets signals
        yield between
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield between
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    recipe: Recipe,
    on_step: Callable[[float], None],
    adapters: Adapters | None = None,
) -> None:
    """Train the adapters, or without any the whole model, on each batch once; see ``Trainer``.

    Raises:
        Diverged: The loss is not finite any more.
    """
    Trainer(model, recipe, adapters).run(batches, on_step)
