"""The gated activations that ``moe_lora_mlp`` knows by name, where no kernel computes them on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrlora_ops import eager
from lrlora_ops.ops._backward import differentiable_once


class _OnCpu(torch.autograd.Function):
    """Saves ``[gate, up]`` and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return eager.gated_activation(gate_up, activation)

    @staticmethod
    @differentiable_once("moe_lora_mlp", "moe_sinc_mlp")
    def backward(ctx: Any, dh: Tensor, gate_up: Tensor) -> tuple[Tensor | None, ...]:
        return eager.gated_activation_backward(dh, gate_up, ctx.activation), None


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of rows ``[gate, up]``: ``[L, 2 I] -> [L, I]``."""
    if gate_up.device.type == "cpu":
        return _OnCpu.apply(gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    return eager.ACTIVATIONS[activation](gate) * up
