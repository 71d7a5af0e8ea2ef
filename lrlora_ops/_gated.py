"""``act(gate) * up`` and its gradient in PyTorch, a block of rows at a time: nothing else is as large as they are.

In half precision a block is computed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lrlora_ops._live import row_blocks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
# From the gradients of their results and their arguments.
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def _halves(gate_up: Tensor) -> tuple[Tensor, ...]:
    """gate and up, in fp32 or fp64."""
    return gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)


@torch.library.custom_op("lrlora_eager::gated_activation", mutates_args=())
def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """``h = act(gate) * up`` of rows ``[gate, up]``: ``[L, 2 I] -> [L, I]``."""
    activate = ACTIVATIONS[activation]
    h = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in row_blocks(*gate_up.shape):
        gate, up = _halves(gate_up[rows])
        torch.mul(activate(gate), up, out=h[rows])
    return h


@gated_activation.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("lrlora_eager::gated_activation_backward", mutates_args=())
def gated_activation_backward(dh: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of ``[gate, up]``, ``[L, 2 I]``, from that of h."""
    activate, differentiate = ACTIVATIONS[activation], _GRADIENTS[activation]
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    for rows in row_blocks(*gate_up.shape):
        gate, up = _halves(gate_up[rows])
        d_gate, d_up = d_gate_up[rows].chunk(2, -1)
        d = dh[rows].to(gate.dtype)
        torch.mul(d, activate(gate), out=d_up)
        d_gate.copy_(differentiate(d * up, gate))
    return d_gate_up


@gated_activation_backward.register_fake
def _(dh: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)
