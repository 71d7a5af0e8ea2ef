"""The experts interface of transformers: which modules are on it, and how their forward goes through an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
            raise ValueError(
                f"{type(experts).__name__}.{name} is not a floating-point [experts, ., .] tensor; load the model "
                "unquantised to adapt its experts"
            )
    return names


def expert_features(experts: Any, projection: str) -> tuple[int, int]:
    """Inputs and outputs of a projection, ``[E, N, K]`` or ``[E, K, N]`` as the experts say."""
    first, second = getattr(experts, projection).shape[1:]
    return (first, second) if experts.is_transposed else (second, first)


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
