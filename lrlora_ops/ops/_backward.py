"""What the backward passes of all ops have in common: they run in the forward's dtypes, and once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.ops._autocast import without_autocast

Gradients = tuple[Tensor | None, ...]
# What can be differentiated any number of times, in the place of an op. Of moe_sinc_mlp there is no such form.
_IN_PLACE_OF = {
    **{op: f"{op}(..., backend='reference')" for op in ("lora_linear", "grouped_lora_linear", "sinc_lora_linear")},
    "moe_lora_mlp": "lrlora_ops.reference.moe_lora_mlp_reference",
}


class _RefuseSecond(torch.autograd.Function):
    """The identity on ``grad``, until somebody differentiates it by what it was computed from."""

    @staticmethod
    def forward(ctx: Any, ops: tuple[str, ...], grad: Tensor, *computed_from: Tensor | None) -> Tensor:
        ctx.ops = ops
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            f"{' or '.join(ctx.ops)} was differentiated twice, and its backward pass has no gradient of its own; call "
            f"{' or '.join(_IN_PLACE_OF[op] for op in ctx.ops if op in _IN_PLACE_OF)}, which can be differentiated any "
            "number of times"
        )


def differentiable_once(*ops: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates ``backward(ctx, dy, *saved_tensors)`` of the ``autograd.Function`` behind public ops.

    It runs outside autocast, in the dtypes that the forward chose. Under ``create_graph=True`` a second
    differentiation raises a RuntimeError that names ``ops``. (PyTorch's ``once_differentiable`` takes the gradients
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
            return tuple(g if g is None else _RefuseSecond.apply(ops, g, dy, *saved) for g in grads)

        return run

    return decorate
