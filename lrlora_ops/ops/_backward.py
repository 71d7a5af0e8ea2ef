"""What the backward passes of all ops have in common: they run in the forward's dtypes, and once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.ops._autocast import without_autocast

Gradients = tuple[Tensor | None, ...]


class _RefuseSecond(torch.autograd.Function):
    """The identity on ``grad``, until somebody differentiates it by what it was computed from."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *computed_from: Tensor | None) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            f"{ctx.op} was differentiated twice, and its backward pass has no gradient of its own; "
            f"call {ctx.op}(..., backend='reference'), which can be differentiated any number of times"
        )


def differentiable_once(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates ``backward(ctx, dy, *saved_tensors)`` of the ``autograd.Function`` behind a public op.

    It runs outside autocast, in the dtypes that the forward chose. Under ``create_graph=True`` a second
    differentiation raises a RuntimeError that names ``op``. (PyTorch's ``once_differentiable`` takes the gradients
    for constants where dy is one, as for ``y.sum()``, and so would drop a gradient penalty in silence.)
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, dy: Tensor) -> Gradients:
            saved = ctx.saved_tensors
            with torch.no_grad(), without_autocast(dy.device):
                grads = backward(ctx, dy, *saved)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return grads
            return tuple(g if g is None else _RefuseSecond.apply(op, g, dy, *saved) for g in grads)

        return run

    return decorate
