"""The experts interface of transformers: which modules are on it, and how their forward goes through an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NAME = CHILD = "lrlora"
_FLAGS = ("is_transposed", "has_bias", "has_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is on the experts interface of transformers."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "config")


def expert_projections(experts: Any) -> tuple[str, str]:
    """The names of the experts' first and second projection.

    Raises:
        ValueError: The module is not on the experts interface of transformers, or is quantised.
    """
    if not is_experts(experts):
        raise ValueError(
            f"{type(experts).__name__} is not on transformers' experts interface (use_experts_implementation), so an "
            "adapter cannot reach its products; use a model that is, or build the layer from "
            "VariableRankLoRAGroupedLinear"
        )
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    for name in names:
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
            raise _no_plain_tensor(experts, name)
    return names


def require_plain_experts(experts: Any) -> None:
    """Refuse torchao's tensors, which say that they are bf16, but which no product with grouped rows takes.

    Raises:
        ValueError: A projection is one, or the module is not on the interface.
    """
    for name in expert_projections(experts):
        if type(getattr(experts, name)).__module__.startswith("torchao."):
            raise _no_plain_tensor(experts, name)


def _no_plain_tensor(experts: Any, name: str) -> ValueError:
    return ValueError(
        f"{type(experts).__name__}.{name} is not a floating-point [experts, ., .] tensor but a "
        f"{type(getattr(experts, name, None)).__name__}; load the model with unquantised experts to adapt them"
    )


def expert_features(experts: Any, projection: str) -> tuple[int, int]:
    """Inputs and outputs of a projection, ``[E, N, K]`` or ``[E, K, N]`` as the experts say."""
    first, second = getattr(experts, projection).shape[1:]
    return (first, second) if experts.is_transposed else (second, first)


def gating(experts: Any) -> Callable[[Tensor], Tensor] | str:
    """The activation between the projections: the module's own function, or its name in ``moe_lora_mlp``.

    A name only for what is known exactly: the interface's own ``act_fn(gate) * up``, which nobody has overridden.
    """
    if not experts.has_gate:
        return experts.act_fn
    from transformers.integrations import moe

    own = experts._apply_gate
    default = getattr(moe, "_default_apply_gate", None)
    known = default is not None and getattr(own, "__func__", None) is default
    return _activation_name(experts.act_fn) or own if known else own


def _activation_name(act_fn: Any) -> str | None:
    """Of transformers' SiLU or tanh GELU, unless its forward is replaced or hooked: its name in ``moe_lora_mlp``."""
    from transformers.activations import GELUTanh, SiLUActivation

    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(act_fn) or any(getattr(act_fn, name, None) for name in hooks):
        return None
    if act_fn is F.silu or type(act_fn) in (SiLUActivation, nn.SiLU):
        return "silu"
    gelu = getattr(act_fn, "act", None)
    is_tanh = isinstance(gelu, partial) and gelu.func is F.gelu and gelu.keywords == {"approximate": "tanh"}
    return "gelu_tanh" if type(act_fn) is GELUTanh and is_tanh else None


def attach(experts: Any, adapter: Any) -> None:
    """Make the adapter a child of the experts, and send their forward through it.

    The experts get a config of their own: no setting of the model's can switch the adapter off.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    adapter.base_config = experts.config
    experts.add_module(CHILD, adapter)
    experts.config = _with_implementation(experts.config, NAME)


def detach(experts: Any, original: Any) -> Any:
    """The experts without their adapter, under the config that ``original``, whose copy they are, once had."""
    experts.config = original.lrlora.base_config
    delattr(experts, CHILD)
    return experts


@contextmanager
def plain_forward(experts: Any) -> Iterator[None]:
    """The experts run without their adapter, in transformers' own loop over experts: it takes every dtype and size."""
    own, experts.config = experts.config, _with_implementation(experts.config, "eager")
    try:
        yield
    finally:
        experts.config = own


def _with_implementation(config: Any, implementation: str) -> Any:
    own = copy.copy(config)
    own._experts_implementation_internal = implementation
    return own


def experts_forward(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``experts_implementation="lrlora"`` runs.

    Raises:
        ValueError: The experts have no adapter.
    """
    if not hasattr(experts, CHILD):
        raise ValueError(
            f"experts_implementation is {NAME!r}, but these experts have no adapter; call apply_lora(model, method, "
            "targets='experts'), or choose another implementation with model.set_experts_implementation('grouped_mm')"
        )
    return experts.lrlora(experts, hidden, top_k_index, top_k_weights)
