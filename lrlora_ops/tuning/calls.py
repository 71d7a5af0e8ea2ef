"""What a layer asks of the kernels: the calls of one training step, with their tensors, to be made again and again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.apply import apply_lora
from lrlora_ops.kernels._configs import Tile, asked
from lrlora_ops.kernels._user_tiles import Key
from lrlora_ops.methods import FixedRank
from lrlora_ops.ops._backends import launcher, recorded, resolve_backend
from lrlora_ops.plan import Layer


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a primitive: its name, and its arguments by name."""

    primitive: str
    arguments: dict[str, Any]

    def __call__(self) -> Tensor | tuple[Tensor, ...] | None:
        if "counters" in self.arguments:  # they must be zero, and are used up
            self.arguments["counters"].zero_()
        return launcher(self.primitive)(**self.arguments)

    def results(self) -> list[Tensor]:
        """What it computes: what it returns, or else what it has written into its arguments."""
        made = self()
        if made is None:
            tensors = (value for value in self.arguments.values() if isinstance(value, Tensor))
            return [tensor.clone() for tensor in tensors if tensor.is_floating_point()]
        return [made] if isinstance(made, Tensor) else list(made)

    def on_meta(self) -> Call:
        """The same with tensors that have no values: enough to compile it, in another process."""
        return Call(self.primitive, {name: _shape(value) for name, value in self.arguments.items()})

    def keys(self) -> dict[Key, Tile]:
        """The tiles that it asks for, and the shipped ones."""
        with asked() as found:
            self()
        return found


def layer_calls(module: nn.Module, layer: Layer, rank: int, device: torch.device) -> list[Call]:
    """The calls of a training step of one adapted layer, with random weights, inputs and routing.

    Args:
        module: The frozen layer, of which only shapes and settings are used: it may be on the meta device.
        layer: Its sizes, and the tokens of a step.
        rank: Of every expert.
        device: Where the calls will run.
    """
    holder = nn.Module()
    holder.layer = copy.deepcopy(module).to_empty(device=device)
    apply_lora(holder, FixedRank(rank), "layer")
    with torch.no_grad():
        for parameter in holder.parameters():  # zeros take less power, and so less time
            parameter.normal_(std=0.02)
    inputs = _inputs(layer, next(module.parameters()).dtype, device)
    with recorded(resolve_backend(None, device)) as made:
        y = holder.layer(*inputs)
        y.backward(torch.randn_like(y))
    return [Call(name, {key: _plain(value) for key, value in arguments.items()}) for name, arguments in made]


def _inputs(layer: Layer, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x ``[T, K]``, and for experts what a router would hand on: indices and weights ``[T, top_k]``."""
    x = torch.randn(layer.tokens, layer.projections[0][0], dtype=dtype, device=device, requires_grad=True)
    if not layer.is_experts:
        return [x]
    scores = torch.rand(layer.tokens, layer.num_experts, device=device)
    weights, index = scores.softmax(1).topk(layer.rows // layer.tokens)
    return [x, index, weights.to(dtype).requires_grad_()]


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
