"""SincPool: the factors of a low-rank product, and the coefficients of a learned function of its elements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrlora_ops import eager
from lrlora_ops._sharding import whole
from lrlora_ops.modules._adapter import ComponentPool
from lrlora_ops.rank_table import RankTable

# Of the power iteration: from a random vector, and from the singular vector that it found before.
_COLD_STEPS, _WARM_STEPS = 32, 8


class SincPool(ComponentPool):
    """``lora_A`` ``[R, K]`` and ``lora_B`` ``[R, N]`` of one projection, and phi of the elements of ``B^T A``.

    Attributes:
        coefficients: Parameter ``[2n + 1]``, in units of the grid; fp32, or fp64 beside fp64. Pools may share one.
        grid: h, the distance of two sinc functions in units of an element of ``B^T A``.
    """

    coefficients: nn.Parameter
    grid: float

    def __init__(
        self,
        pool_size: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        num_coefficients: int,
        grid: float | None,
    ) -> None:
        super().__init__(pool_size, in_features, out_features, device, dtype)
        self._add_phi(num_coefficients, grid)

    def _add_phi(self, num_coefficients: int, grid: float | None) -> None:
        """To components that are there already; see ``SincLoRALinear`` for the default of the grid.

        Raises:
            ValueError: A setting is out of range.
        """
        if num_coefficients < 1 or num_coefficients % 2 == 0:
            raise ValueError(f"num_coefficients is {num_coefficients}; it must be odd and at least 1: k from -n to n")
        self.grid = 0.1 / max(self.in_features, 1) ** 0.5 if grid is None else float(grid)
        if not 0 < self.grid < float("inf"):
            raise ValueError(f"grid is {grid}; it must be a finite number above 0")
        dtype = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        self.coefficients = nn.Parameter(torch.zeros(num_coefficients, device=self.lora_A.device, dtype=dtype))

    def own_tensors(self) -> dict[str, nn.Parameter]:
        return {**super().own_tensors(), "coefficients": self.coefficients}

    def in_units_of_z(self) -> Tensor:
        """The coefficients as the ops take them, at least in fp32."""
        return _scaled(self.coefficients, self.grid)

    @torch.no_grad()
    def delta(self, rows: Tensor, scaling: float, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = (whole(parameter)[rows].to(dtype) for parameter in (self.lora_A, self.lora_B))
        nothing = a.new_zeros(()).expand(self.out_features, self.in_features)
        return eager.sinc_weight(nothing, a, b, _scaled(whole(self.coefficients), self.grid), self.grid, scaling, dtype)

    @torch.no_grad()
    def stable_ranks(self, table: RankTable, scaling: float) -> Tensor:
        """fp32 ``[E]``: ``||dW||_F^2 / ||dW||_2^2`` of each expert's update dW, 0 while that is zero.

        The spectral norm is found by power iteration, from the vectors of the last call on if there was one.
        """
        known: Tensor | None = getattr(self, "_directions", None)
        steps = _WARM_STEPS
        if known is None or known.device != self.lora_A.device:
            generator = torch.Generator().manual_seed(0)
            known = torch.randn(table.num_experts, self.in_features, generator=generator).to(self.lora_A.device)
            steps = _COLD_STEPS
        self._directions = known
        ranks = []
        for expert, direction in enumerate(known):
            update = self.delta(table.rows_of(expert), scaling, torch.float32)
            found = direction
            for _ in range(steps):
                found = F.normalize(update.t() @ F.normalize(update @ found, dim=0), dim=0)
            largest = (update @ found).square().sum()
            direction.copy_(torch.where(largest > 0, found, direction))
            ranks.append(torch.where(largest > 0, update.square().sum() / largest, largest))
        return torch.stack(ranks)


def _scaled(coefficients: Tensor, grid: float) -> Tensor:
    return coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)) * grid
