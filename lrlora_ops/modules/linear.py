"""VariableRankLoRALinear: a frozen linear layer with a LoRA whose rank is a number on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops._sharding import zero_rows
from lrlora_ops.modules._linear import LinearAdapter
from lrlora_ops.modules._quantised import has_no_derivative, is_quantised, merge_quantised
from lrlora_ops.ops.lora_linear import lora_linear
from lrlora_ops.rank_table import RankTable


class VariableRankLoRALinear(LinearAdapter):
    """``y = x W^T + bias + scaling * sum_{j < rank} <x, a_j> b_j`` with W and bias frozen.

    ``lora_A`` starts uniform in ``+-1/sqrt(in_features)`` (PEFT's), ``lora_B`` at zero, so that a new adapter
    changes no output. ``scaling = lora_alpha / max_rank`` does not depend on the current rank.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the base layer has a bias.
        max_rank: R, the components that the adapter holds.
        rank: How many of them are live at the start.
        lora_alpha: Default ``2 * max_rank``, so that scaling is 2.
        dropout: Probability of dropping an element of x on the adapter's branch, in training.
        device: Where the tensors are made.
        dtype: Of all parameters.

    Attributes:
        lora_A: Parameter ``[max_rank, in_features]``.
        lora_B: Parameter ``[max_rank, out_features]``: the transpose of PEFT's ``lora_B.weight``.
        weight: Frozen parameter ``[out_features, in_features]``; None if another layer is wrapped.
        bias: Frozen parameter ``[out_features]``, or None.
        base_layer: The wrapped layer if it is not a plain ``nn.Linear``, else None.
        scaling: ``lora_alpha / max_rank``; it stays what it was when the rank or the capacity changes.
        table: The ``RankTable`` that rank methods drive; it travels in the state dict.

    Raises:
        ValueError: A size, the rank or the dropout is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        max_rank: int = 32,
        rank: int = 8,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        nn.Module.__init__(self)
        self._adopt(base)
        self._add_adapter(in_features, out_features, base.weight.device, dtype, max_rank, rank, lora_alpha, dropout)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        *,
        max_rank: int = 32,
        rank: int = 8,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> VariableRankLoRALinear:
        """Wrap a layer: a plain ``nn.Linear`` hands over its parameters, any other is called for its output.

        The layer's parameters are frozen. The state dict of a wrapped ``nn.Linear`` keeps its names.

        Args:
            layer: Has ``in_features`` and ``out_features``, and maps ``[..., K]`` to ``[..., N]``.
            max_rank: R, the components that the adapter holds.
            rank: How many of them are live at the start.
            lora_alpha: Default ``2 * max_rank``, so that scaling is 2.
            dropout: Probability of dropping an element of x on the adapter's branch, in training.
            dtype: Of ``lora_A`` and ``lora_B``; default fp32, as PEFT does, since updates of a trained bf16 parameter
                are lost in rounding; fp64 for an fp64 layer.

        Returns:
            The module to put in the layer's place; it is part of no model yet.

        Raises:
            ValueError: The layer does not say its sizes, or an argument is out of range.
        """
        return cls._around(layer, dtype, max_rank, rank, lora_alpha, dropout)

    def _add_adapter(
        self,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype | None,
        max_rank: int,
        rank: int,
        lora_alpha: float | None,
        dropout: float,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        self.dropout = dropout
        self._add_table(RankTable(1, max_rank, max_rank, device), lora_alpha)
        self._add_components(max_rank, in_features, out_features, device, dtype)
        self.set_rank(rank)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``. In training mode a method's sampled ranks and probes apply.

        Args:
            x: As ``lora_linear`` takes it; also of a base layer, which is called with it.

        Returns:
            In the base's dtype; under autocast in autocast's.

        Raises:
            RuntimeError: In training, the base layer passes no gradient on to x.
        """
        ranks, (gate,) = self.running()
        return lora_linear(
            x,
            self.lora_A,
            self.lora_B,
            gate=gate,
            rank=ranks,
            scaling=self.scaling,
            weight=self.weight,
            bias=self.bias,
            base=None if self.base_layer is None else self._base(x),
            dropout=self.dropout if self.training else 0.0,
        )

    def _base(self, x: Tensor) -> Tensor:
        layer: Any = self.base_layer
        base = layer(x)
        needs_gradient = self.training and torch.is_grad_enabled() and x.requires_grad
        if needs_gradient and (not base.requires_grad or has_no_derivative(layer)):
            raise RuntimeError(
                f"the base layer, a {type(layer).__name__}, gives x no gradient, so that what comes before it would "
                "train on a wrong one; quantise the weights alone, in a layout whose product has a derivative (of "
                "torchao's int4 that of IntxWeightOnlyConfig), or leave the layer out of targets"
            )
        return base

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Make ``rank`` components live, by device writes alone.

        Growing leaves the output bit-identical: the components that become live start with ``b = 0``. Shrinking
        drops the last ones.

        Args:
            rank: From 0 to ``max_rank``.

        Raises:
            ValueError: The rank is not from 0 to ``max_rank``.
        """
        if not isinstance(rank, int) or not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank is {rank!r}; it must be an integer from 0 to max_rank, {self.max_rank}")
        born = self.table.update(torch.full_like(self.table.ranks, rank))
        zero_rows(self.lora_B, born)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A copy of the base layer with the update in its weight, checked against this module's forward.

        A weight of bitsandbytes or torchao is quantised again, its own way. What that loses must be within the
        rounding of the dtype that the layer computes in: 8 bits hold an update beside bf16, 4 bits hold none.

        Raises:
            ValueError: The base layer has no weight ``[N, K]`` to add to.
            RuntimeError: The merged layer's output differs from the adapter's.
        """
        if self.base_layer is not None and is_quantised(self.base_layer):
            return merge_quantised(self, self.base_layer)
        return super().merge()

    @torch.no_grad()
    def resize(self, max_rank: int) -> None:
        """Hold ``max_rank`` components: the first ones, or these and new ones. Scaling and output stay.

        The parameters keep their identity, and lose their gradient. Reads the rank on the host.

        Args:
            max_rank: The rank or more.

        Raises:
            ValueError: ``max_rank`` is below the rank.
        """
        rank, held = int(self.rank), min(max_rank, self.max_rank)
        if max_rank < rank:
            raise ValueError(f"max_rank is {max_rank}, below the rank {rank}; lower the rank first with set_rank")
        self.hold(torch.arange(held, device=self.lora_A.device), max_rank)
        self.table.resize(max_rank)
