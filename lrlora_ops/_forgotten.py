"""A training loop without ``Adapters.step()``: its ranks would stay as they are, and nothing would say so."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters


class StepReminder:
    """Warns, once, when an optimizer moves the adapters twice and ``step()`` was not called.

    It hears of optimizers' steps alone, so accumulated micro-batches do not count, and only until ``step()`` is called
    for the first time: a loop that has the line pays for nothing.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = weakref.ref(adapters)
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hook = register_optimizer_step_post_hook(self._after_optimizer)
        weakref.finalize(adapters, self._hook.remove)

    def stop(self) -> None:
        """Nothing is forgotten, or the warning is out."""
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
        self.stop()
        warnings.warn(
            "the optimizer has moved the adapters twice, but their ranks cannot change before adapters.step() is "
            "called: add the line 'adapters.step()' before 'optimizer.step()', or give a Trainer "
            "'callbacks=[adapters.callback()]'",
            stacklevel=3,
        )
