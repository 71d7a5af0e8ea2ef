"""SincLoRALinear: a frozen linear layer moved by a learned elementwise function of a low-rank product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrlora_ops.modules._linear import LinearAdapter
from lrlora_ops.modules._sinc import SincPool
from lrlora_ops.ops.sinc_lora_linear import sinc_lora_linear
from lrlora_ops.rank_table import RankTable


class SincLoRALinear(LinearAdapter, SincPool):
    """``y = x (W + scaling * phi(B^T A))^T + bias`` with W and bias frozen, and phi learned, for each element z alike:

    ``phi(z) = z + h * sum_{k=-n..n} c_k (psi_k(z) - psi_k(0))`` with ``psi_k(z) = sinc(z / h - k)`` and h the grid.

    It starts as LoRA: ``c = 0``, ``lora_A`` uniform in ``+-1/sqrt(in_features)``, ``lora_B = 0``, so that a new adapter
    changes no output. phi lifts the rank: the update of a small A and B can be a matrix of any rank.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the base layer has a bias.
        rank: R, the rows of ``lora_A`` and ``lora_B``. It stays.
        num_coefficients: ``2n + 1``, an odd number.
        grid: h, the distance of two sinc functions in units of z, an element of ``B^T A``. phi bends elements up to
            about ``n h``, and is a line beyond. Default ``0.1 / sqrt(in_features)``, a tenth of what an element of a
            weight usually is.
        lora_alpha: Default ``2 * rank``, so that ``scaling = lora_alpha / rank`` is 2.
        device: Where the tensors are made.
        dtype: Of all parameters but the coefficients.

    Attributes:
        coefficients: Parameter ``[num_coefficients]``, c, in units of the grid; fp32, or fp64 beside fp64. Several
            layers may share one.
        lora_A, lora_B, weight, bias: As ``VariableRankLoRALinear`` has them.

    Raises:
        ValueError: A size or setting is out of range.
    """

    weight: nn.Parameter
    reports_sensitivity = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        num_coefficients: int = 9,
        grid: float | None = None,
        lora_alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        nn.Module.__init__(self)
        self._adopt(base)
        self._add_adapter(
            in_features, out_features, base.weight.device, dtype, rank, num_coefficients, grid, lora_alpha
        )

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        *,
        rank: int = 8,
        num_coefficients: int = 9,
        grid: float | None = None,
        lora_alpha: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> SincLoRALinear:
        """Wrap a plain ``nn.Linear``, which hands over its parameters; they are frozen and keep their names.

        Args:
            layer: An ``nn.Linear`` without hooks and with a floating-point weight: the update is made in its place.
            rank, num_coefficients, grid, lora_alpha: As for the class.
            dtype: Of ``lora_A`` and ``lora_B``; default fp32, or fp64 for an fp64 layer.

        Raises:
            ValueError: The layer is not plain, or an argument is out of range.
        """
        return cls._around(layer, dtype, rank, num_coefficients, grid, lora_alpha)

    def _adopt(self, layer: nn.Module) -> None:
        super()._adopt(layer)
        if self.base_layer is not None:
            raise ValueError(
                f"the layer is a {type(layer).__name__} that is no plain nn.Linear (quantised, hooked, or with a "
                "forward of its own), and the learned function needs its weight; load the layer unquantised, or "
                "adapt it by another method, FixedRank say"
            )

    def _add_adapter(
        self,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype | None,
        rank: int,
        num_coefficients: int,
        grid: float | None,
        lora_alpha: float | None,
    ) -> None:
        self._add_table(RankTable.uniform(1, rank, device=device), lora_alpha)
        self._add_components(rank, in_features, out_features, device, dtype)
        self._add_phi(num_coefficients, grid)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``; between forward and backward it keeps x alone."""
        return sinc_lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.in_units_of_z(),
            grid=self.grid,
            scaling=self.scaling,
            bias=self.bias,
        )

    def shown_rank(self) -> Tensor:
        return self.stable_rank()

    def stable_rank(self) -> Tensor:
        """fp32 ``[]``: ``||dW||_F^2 / ||dW||_2^2`` of the update dW, 0 while that is zero.

        The spectral norm is found by power iteration, from the vector of the last call on if there was one.
        """
        return self.stable_ranks(self.table, self.scaling)[0]

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "grid": self.grid, "num_coefficients": len(self.coefficients)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_coefficients={len(self.coefficients)}, grid={self.grid:g}"
