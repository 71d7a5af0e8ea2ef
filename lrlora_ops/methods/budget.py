"""A budget of rank components, spent by continuous ranks: the projection onto it and the rounding to integers.

Both are tensor operations on the device of their input and never read a value on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_to_budget(rho: Tensor, budget: float, max_rank: int) -> Tensor:
    """Shift all ranks by one constant, clamped to ``0..max_rank``, so that they sum to the budget.

    The sum ``f(s) = sum(clamp(rho + s, 0, max_rank))`` is piecewise linear: a rank starts to count at the shift
    ``-rho`` and stops growing at ``max_rank - rho``. So the shift is exact, from the sorted breakpoints.

    Args:
        rho: fp64 ``[G]``, each within ``0..max_rank``.
        budget: The sum wanted, within ``0..G * max_rank``.
        max_rank: The most that one group may have, at least 1.

    Returns:
        fp64 ``[G]``, each within ``0..max_rank``, summing to ``budget`` up to rounding errors.
    """
    breakpoints, order = torch.cat([-rho, max_rank - rho]).sort()
    slopes = (1 - 2 * (order >= rho.numel()).to(rho)).cumsum(0)
    sums = torch.cat([rho.new_zeros(1), (slopes[:-1] * breakpoints.diff()).cumsum(0)])
    segment = (sums <= budget).sum(0, keepdim=True) - 1
    missing = budget - sums.gather(0, segment)
    shift = breakpoints.gather(0, segment) + missing / slopes.gather(0, segment).clamp(min=1)
    return (rho + shift).clamp(0, max_rank)


def largest_remainder(rho: Tensor, total: int | Tensor) -> Tensor:
    """Round ranks down, then give what is missing to the largest remainders; ties go to the lower index.

    Args:
        rho: fp64 ``[G]``, not negative, summing to ``total`` up to less than one.
        total: The integer that the result sums to, as a number or a 0-d tensor.

    Returns:
        int32 ``[G]``, each ``floor(rho)`` or ``ceil(rho)``, summing to ``total`` exactly.
    """
    floor = rho.floor()
    order = (rho - floor).argsort(descending=True, stable=True)
    extra = torch.arange(rho.numel(), device=rho.device) < total - floor.sum()
    return (floor + torch.zeros_like(rho).scatter(0, order, extra.to(rho))).int()
