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
from lrlora_ops.methods import Method
from lrlora_ops.ops._backends import launcher, recorded, resolve_backend
from lrlora_ops.plan import Layer

# What these do with a weight is called by itself as well: beside their products its time would hardly show.
_ALONE = {"sinc_gemm": "sinc_weight", "sinc_gemm_backward": "sinc_gradients"}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a primitive: its name, and its arguments by name."""

    primitive: str
    arguments: dict[str, Any]

    def __call__(self) -> Tensor | tuple[Tensor, ...] | None:
        return launcher(self.primitive)(**self._ready())

    def _ready(self) -> dict[str, Any]:
        """The arguments, those that a call uses up made anew: counters must be zero, and m becomes a weight."""
        if "counters" in self.arguments:
            self.arguments["counters"].zero_()
        if "m" in self.arguments:
            return self.arguments | {"m": self.arguments["m"].clone()}
        return self.arguments

    def results(self) -> list[Tensor]:
        """What it computes: what it returns, and m; or else what it has written into its arguments."""
        arguments = self._ready()
        made = launcher(self.primitive)(**arguments)
        if made is None:
            tensors = (value for value in arguments.values() if isinstance(value, Tensor))
            return [tensor.clone() for tensor in tensors if tensor.is_floating_point()]
        returned = [made] if isinstance(made, Tensor) else list(made)
        if self.primitive == "sinc_gemm_backward":  # its fp32 sums are of an m that is rounded to the products' dtype
            returned = [tensor.to(arguments["dtype"]) for tensor in returned]
        return [*returned, arguments["m"]] if "m" in arguments else returned

    def on_meta(self) -> Call:
        """The same with tensors that have no values: enough to compile it, in another process."""
        return Call(self.primitive, {name: _shape(value) for name, value in self.arguments.items()})

    def keys(self) -> dict[Key, Tile]:
        """The tiles that it asks for, and the shipped ones, but for what is called by itself as well."""
        with asked() as found:
            self()
        apart = _ALONE.values() if self.primitive in _ALONE else ()
        return {key: tile for key, tile in found.items() if key[0] not in apart}

    def alone(self) -> list[Call]:
        """What it does with a weight, without its products: ``_ALONE``."""
        if self.primitive not in _ALONE:
            return []
        names = ("weight", "a", "b", "c", "grid", "scaling", "group_offsets")
        given = {name: self.arguments[name] for name in names}
        if self.arguments["transposed"]:
            given |= {"a": given["b"], "b": given["a"]}
        if (offsets := given["group_offsets"]) is not None:  # rows for all: weights of experts without any are not set
            given["group_offsets"] = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device)
        dtype = self.arguments["dtype"]
        if self.primitive == "sinc_gemm":
            given["dtype"] = dtype
        else:
            given["m"] = torch.randn_like(given["weight"], dtype=dtype)
        return [Call(_ALONE[self.primitive], given)]


def layer_calls(module: nn.Module, layer: Layer, method: Method, device: torch.device) -> list[Call]:
    """The calls of a training step of one adapted layer, with random weights, inputs and routing.

    Args:
        module: The frozen layer, of which only shapes and settings are used: it may be on the meta device.
        layer: Its sizes, and the tokens of a step.
        method: Whose adapter it gets, of the method's highest rank.
        device: Where the calls will run.
    """
    holder = nn.Module()
    holder.layer = copy.deepcopy(module).to_empty(device=device)
    apply_lora(holder, method, "layer")
    with torch.no_grad():
        for parameter in holder.parameters():  # zeros take less power, and so less time
            parameter.normal_(std=0.02)
    inputs = _inputs(layer, next(module.parameters()).dtype, device)
    with recorded(resolve_backend(None, device)) as made:
        y = holder.layer(*inputs)
        y.backward(torch.randn_like(y))
    calls = [Call(name, {key: _plain(value) for key, value in arguments.items()}) for name, arguments in made]
    return [part for call in calls for part in (*call.alone(), call)]


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
