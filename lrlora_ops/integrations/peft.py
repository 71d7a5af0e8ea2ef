"""Stock PEFT LoRA models on the kernels of this library: same parameters, same checkpoints, same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn

from lrlora_ops.integrations._peft_layout import expert_components, is_swapped
from lrlora_ops.modules._interface import expert_features, expert_projections, is_experts, require_plain_experts
from lrlora_ops.modules._linear import is_customised
from lrlora_ops.modules.experts import run_experts
from lrlora_ops.ops import lora_linear
from lrlora_ops.rank_table import RankTable


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate`` did.

    Attributes:
        taken: The layers that run on this library's ops, by name.
        left: The other LoRA layers, and why.
    """

    taken: dict[str, nn.Module]
    left: dict[str, str]

    def undo(self) -> None:
        """Give the layers their own forward back."""
        for layer in self.taken.values():
            vars(layer).pop("forward", None)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} LoRA layers run on lrlora_ops"]
        return "\n".join(lines + [f"left to PEFT: {name}, {reason}" for name, reason in self.left.items()])


def accelerate(model: nn.Module) -> Acceleration:
    """Run the LoRA layers of a PEFT model, linear ones and the experts of transformers, on this library's ops.

    Parameters, checkpoints and results stay PEFT's, up to rounding. A layer steps aside, call by call, while its
    adapter is merged or disabled, while several are active, or while the base trains. Calling it again changes nothing.

    Args:
        model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned, or a model that holds it.

    Returns:
        What was taken over, what was left and why; ``undo()`` ends it.

    Raises:
        ValueError: The model has no LoRA layer.
    """
    layers = dict(_outermost(model))
    if not layers:
        raise ValueError("the model has no LoRA layer of PEFT; make some with peft.get_peft_model")
    left = {name: reason for name, layer in layers.items() if (reason := _obstacle(layer))}
    taken = {name: layer for name, layer in layers.items() if name not in left}
    for layer in taken.values():
        layer.forward = MethodType(_run_linear if type(layer) is Linear else _run_experts, layer)
    return Acceleration(taken, left)


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The LoRA layers but those that another one wraps: the wrappers of an experts module's parameters are nested."""
    inner = {id(layer.base_layer) for layer in model.modules() if isinstance(layer, ParamWrapper)}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and id(layer) not in inner:
            yield name, layer


def _obstacle(layer: Any) -> str | None:
    """Why a layer cannot be taken over, ever."""
    own = vars(layer).get("forward")
    if is_customised(layer) and getattr(own, "__func__", None) not in (_run_linear, _run_experts):
        return "which has hooks or a forward of its own"
    if type(layer) is ParamWrapper:
        return _obstacle_to_experts(layer)
    if type(layer) is not Linear:
        return f"a {type(layer).__module__.rpartition('.')[0]}.{type(layer).__name__}"
    base = layer.base_layer
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or is_customised(base):
        return f"whose base layer, a {type(base).__name__}, is no plain nn.Linear"
    return None


def _obstacle_to_experts(layer: Any) -> str | None:
    experts = layer.get_base_layer()
    if not is_experts(experts):
        return f"whose parameter is of a {type(experts).__name__}, not of transformers' experts"
    try:
        names = expert_projections(experts)
        require_plain_experts(experts)
    except ValueError as error:
        return f"whose experts cannot be reached: {error}"
    others = [wrapper.parameter_name for wrapper in _wrappers(layer) if wrapper.parameter_name not in names]
    return f"whose parameter {others[0]} is none of {names}" if others else None


def _wrappers(layer: Any) -> Iterator[Any]:
    """The wrappers of an experts module's parameters, from the outermost inwards."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _adapter(layer: Any) -> str | None:
    """The name of the one plain adapter that is active now; None if PEFT must run the layer."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    special = active[0] in layer.lora_variant or layer.lora_bias.get(active[0]) or layer.fan_in_fan_out
    return None if special else active[0]


def _run_linear(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of ``lora.Linear.forward``."""
    base, name = layer.base_layer, _adapter(layer)
    if (
        name is None
        or args
        or kwargs
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
    ):
        return Linear.forward(layer, x, *args, **kwargs)
    dropout, lora_a = layer.lora_dropout[name], layer.lora_A[name].weight
    if lora_a.dtype not in (x.dtype, torch.float32) or type(dropout) not in (nn.Identity, nn.Dropout):
        return Linear.forward(layer, x)
    return lora_linear(
        x,
        lora_a,
        layer.lora_B[name].weight.t(),
        scaling=layer.scaling[name],
        weight=base.weight,
        bias=base.bias,
        dropout=dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0,
    )


def _run_experts(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of the ``ParamWrapper.forward`` of an experts module's parameters."""
    experts, wrappers = layer.get_base_layer(), {wrapper.parameter_name: wrapper for wrapper in _wrappers(layer)}
    names = expert_projections(experts)
    adapters = {projection: _adapter(wrapper) for projection, wrapper in wrappers.items()}
    trains = any(parameter.requires_grad for parameter in experts.parameters(recurse=False))
    if None in adapters.values() or len(args) != 2 or kwargs or trains:
        return ParamWrapper.forward(layer, hidden, *args, **kwargs)
    factors = {p: _components(wrappers[p], adapters[p], experts) for p in wrappers}
    if any(a.dtype not in (hidden.dtype, torch.float32) for a, _ in factors.values()):
        return ParamWrapper.forward(layer, hidden, *args)
    rank, pools = max(a.shape[1] for a, _ in factors.values()), []
    for projection in names:
        a, b = factors[projection] if projection in factors else _nothing(experts, projection, hidden)
        pools.append((_pool(a, rank), _pool(b, rank), None))
    return run_experts(experts, hidden, *args, pools, _table(len(a), rank, hidden.device))


def _pool(components: Tensor, rank: int) -> Tensor:
    """``[E * rank, K]``: the components ``[E, r, K]``, padded with zeros."""
    return F.pad(components, (0, 0, 0, rank - components.shape[1])).flatten(0, 1)


def _components(wrapper: Any, adapter: str | None, experts: Any) -> tuple[Tensor, Tensor]:
    """a ``[E, r, K]`` and b ``[E, r, N]`` of a wrapped parameter; b has the scaling in it."""
    lora_a, lora_b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    features = expert_features(experts, wrapper.parameter_name)
    swapped = is_swapped(lora_a.shape[1], *features, experts.is_transposed, peft.__version__)
    a, b = expert_components(lora_a, lora_b, wrapper.num_experts, swapped)
    return a, b * wrapper.scaling[adapter]


def _nothing(experts: Any, projection: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """No components for a projection that has no LoRA."""
    num_experts = getattr(experts, projection).shape[0]
    a, b = (like.new_zeros(num_experts, 0, size) for size in expert_features(experts, projection))
    return a, b


@lru_cache(maxsize=64)
def _table(num_experts: int, rank: int, device: torch.device) -> RankTable:
    with torch.inference_mode(False):  # it may serve training later
        return RankTable.uniform(num_experts, rank, device=device)
