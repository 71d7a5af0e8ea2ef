"""What a training loop can get wrong without an error: no ``Adapters.step()``, or adapters that it passes by."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters


class FirstSteps:
    """Watches a loop until its first ``step()``, and is silent, and costs nothing, from then on.

    Warns, once, when an optimizer moves the adapters twice and ``step()`` was not called: it hears of optimizers' steps
    alone, so accumulated micro-batches do not count. At the first ``step()``, warns of adapters that got no gradient
    though others did.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = weakref.ref(adapters)
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._over = False
        self._hook = register_optimizer_step_post_hook(self._after_optimizer)
        weakref.finalize(adapters, self._hook.remove)

    def on_step(self) -> None:
        """``step()`` is called."""
        adapters = self._adapters()
        if adapters is None or self._over:
            return
        self._stop()
        trained = {name: p.grad is not None for name, p in adapters.named_parameters() if p.requires_grad}
        idle = sorted({name.rpartition(".")[0] for name, has_gradient in trained.items() if not has_gradient})
        if idle and any(trained.values()):
            warnings.warn(
                f"{', '.join(idle[:3])}{f' and {len(idle) - 3} more' if len(idle) > 3 else ''} got no gradient in the "
                "first step, though other adapters did. If the loop never calls them (TRL's trainers multiply by "
                "lm_head.weight themselves), leave them out of targets",
                stacklevel=3,
            )

    def _stop(self) -> None:
        self._over = True
        self._hook.remove()

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        adapters = self._adapters()
        if adapters is None or all(policy.frozen for policy in adapters.policies):
            return
        if optimizer not in self._seen:
            own = {id(parameter) for parameter in adapters.parameters()}
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                self._seen.add(optimizer)
            return
        self._stop()
        warnings.warn(
            "the optimizer has moved the adapters twice, but their ranks cannot change before adapters.step() is "
            "called: add the line 'adapters.step()' before 'optimizer.step()', or give a Trainer "
            "'callbacks=[adapters.callback()]'",
            stacklevel=3,
        )
