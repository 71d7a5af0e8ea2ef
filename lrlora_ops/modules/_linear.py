"""What adapters of a linear layer have in common: the frozen layer, and the way into its weight."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrlora_ops.modules._adapter import ComponentPool, RankAdapter
from lrlora_ops.modules._merge import check_merge
from lrlora_ops.modules._quantised import ELSEWHERE, FLOATING, keep_differentiable

Self = TypeVar("Self", bound="LinearAdapter")


class LinearAdapter(RankAdapter, ComponentPool):
    """A frozen linear layer and its one pool of components; subclasses say what these compute.

    Attributes:
        lora_A: Parameter ``[max_rank, in_features]``.
        lora_B: Parameter ``[max_rank, out_features]``: the transpose of PEFT's ``lora_B.weight``.
        weight, bias: Frozen parameters ``[out_features, in_features]`` and ``[out_features]``, or None.
        base_layer: The wrapped layer if it is not a plain ``nn.Linear``, else None.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    base_layer: nn.Module | None

    @classmethod
    def _around(cls: type[Self], layer: nn.Module, dtype: torch.dtype | None, *settings: Any) -> Self:
        """Wrap a layer, see ``from_linear``; ``settings`` are the last arguments of ``_add_adapter``."""
        if isinstance(layer, LinearAdapter):
            raise ValueError(f"the layer is a {type(layer).__name__} already; change that one, or merge it first")
        in_features: Any = getattr(layer, "in_features", None)
        out_features: Any = getattr(layer, "out_features", None)
        if in_features is None or out_features is None:
            raise ValueError(
                f"{type(layer).__name__} has no in_features and out_features; give it these attributes, or write "
                "the adapter with lora_linear(x, ..., base=layer(x))"
            )
        weight = getattr(layer, "weight", None)
        if dtype is None:
            dtype = torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32
        device = next((p.device for p in [*layer.parameters(), *layer.buffers()]), torch.device("cpu"))
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(layer)
        self._add_adapter(in_features, out_features, device, dtype, *settings)
        layer.requires_grad_(False)
        keep_differentiable(layer)
        return self

    def _adopt(self, layer: nn.Module) -> None:
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not is_customised(layer)
        self.base_layer = None if plain else layer
        self.register_parameter("weight", layer.weight if plain else None)  # type: ignore[arg-type]
        self.register_parameter("bias", layer.bias if plain else None)  # type: ignore[arg-type]

    def _add_adapter(self, *settings: Any) -> None:
        """Make the trained tensors, from in_features, out_features, device, dtype and a subclass's own settings.

        Raises:
            ValueError: A setting is out of range.
        """
        raise NotImplementedError

    def pools(self) -> dict[str, ComponentPool]:
        return {"": self}

    @property
    def rank(self) -> Tensor:
        """int32 ``[]`` on the device: the live components. ``int(layer.rank)`` waits for the device."""
        return self.table.ranks[0]

    def shown_rank(self) -> Tensor:
        return self.rank

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """``[N, K]``: what ``merge`` adds to the weight.

        Args:
            dtype: To compute in; default fp32, or fp64 for an fp64 adapter.
        """
        return self.delta(self.table.rows_of(0), self.scaling, dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A copy of the base layer with the update in its weight, checked against this module's forward.

        Raises:
            ValueError: The base layer has no weight ``[N, K]`` to add to.
            RuntimeError: The merged layer's output differs from the adapter's.
        """
        weight = self.plain_weight()
        merged: Any = self.plain(self) if self.base_layer is None else copy.deepcopy(self.base_layer)
        updated = weight.detach().clone()
        self.add_update("", updated)
        merged.weight = nn.Parameter(updated, False) if isinstance(weight, nn.Parameter) else updated
        check_merge(self, merged, weight, self.delta_weight(torch.float64))
        return merged

    def plain_weight(self) -> Tensor:
        """``[N, K]``: the weight that the update can be added to.

        Raises:
            ValueError: The base layer has no plain floating-point weight.
        """
        weight: Any = self.weight if self.base_layer is None else getattr(self.base_layer, "weight", None)
        shape = (self.out_features, self.in_features)
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in FLOATING or weight.shape != shape:
            raise ValueError(
                f"the base layer has no plain floating-point weight of shape {shape} to merge into, but "
                f"{'none' if weight is None else f'a {type(weight).__name__}'}; {ELSEWHERE}"
            )
        return weight

    def merge_into(self, host: nn.Module) -> nn.Module:
        return self.merge()

    def plain(self, host: nn.Module) -> nn.Module:
        if self.base_layer is not None:
            return self.base_layer
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias  # type: ignore[assignment]
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, max_rank={self.max_rank}"


def is_customised(layer: nn.Module) -> bool:
    """Whether the layer has hooks or a forward of its own, as accelerate gives it: only calling it heeds them."""
    return "forward" in vars(layer) or any(value for key, value in vars(layer).items() if key.endswith("_hooks"))
