"""The budget: the closed-form projection against bisection, and rounding that loses no component."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrlora_ops.methods.budget import largest_remainder, project_to_budget

ranks_and_max = st.integers(1, 64).flatmap(
    lambda max_rank: st.tuples(
        st.lists(st.floats(0, max_rank, allow_subnormal=False), min_size=1, max_size=40), st.just(max_rank)
    )
)


def bisect(rho: list[float], budget: float, max_rank: int) -> list[float]:
    low, high = -float(max_rank), float(max_rank)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(max(r + middle, 0.0), max_rank) for r in rho) < budget:
            low = middle
        else:
            high = middle
    return [min(max(r + high, 0.0), max_rank) for r in rho]


@given(ranks_and_max, st.floats(0, 1))
def test_projection_is_the_shift_that_bisection_finds(case, fraction):
    rho, max_rank = case
    budget = round(fraction * max_rank * len(rho))
    projected = project_to_budget(torch.tensor(rho, dtype=torch.float64), budget, max_rank)
    assert projected.sum().item() == pytest.approx(budget, abs=1e-9)
    assert projected.tolist() == pytest.approx(bisect(rho, budget, max_rank), abs=1e-9)


@pytest.mark.parametrize(
    "rho, budget, projected",
    [
        ([1.0, 2.0, 3.0], 6, [1.0, 2.0, 3.0]),  # already there
        ([0.0, 0.0, 0.0], 6, [2.0, 2.0, 2.0]),  # equal ranks: equal breakpoints
        ([0.0, 4.0, 0.0], 8, [2.0, 4.0, 2.0]),  # the one at the maximum stays there
        ([0.0, 4.0, 1.0], 3, [0.0, 3.0, 0.0]),  # clamped at zero
        ([0.5, 4.0, 1.0], 0, [0.0, 0.0, 0.0]),  # nothing to spend
        ([0.5, 4.0, 1.0], 12, [4.0, 4.0, 4.0]),  # everything
        ([0.0, 4.0], 4, [0.0, 4.0]),  # a plateau of the sum: no shift up to 4 changes it
        ([2.5], 3, [3.0]),  # one group
    ],
)
def test_projection_by_hand(rho, budget, projected):
    assert project_to_budget(torch.tensor(rho, dtype=torch.float64), budget, 4).tolist() == projected


def test_projection_of_many_groups_is_exact_enough_to_round():
    """48 layers of 128 experts: a sum of 12,288 breakpoints."""
    rho = torch.rand(6144, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 32
    projected = project_to_budget(rho, 49_153, 32)
    assert projected.sum().item() == pytest.approx(49_153, abs=1e-6)
    assert largest_remainder(projected, 49_153).sum() == 49_153


@given(ranks_and_max, st.floats(0, 1))
def test_projected_ranks_round_to_the_budget_exactly(case, fraction):
    rho, max_rank = case
    budget = round(fraction * max_rank * len(rho))
    projected = project_to_budget(torch.tensor(rho, dtype=torch.float64), budget, max_rank)
    ranks = largest_remainder(projected, budget)
    assert ranks.dtype == torch.int32
    assert sum(ranks.tolist()) == budget
    for rank, value in zip(ranks.tolist(), projected.tolist(), strict=True):
        assert math.floor(value) <= rank <= min(math.floor(value) + 1, max_rank)


@pytest.mark.parametrize(
    "rho, total, ranks",
    [
        ([1.5, 1.5, 1.0], 4, [2, 1, 1]),  # a tie goes to the lower index
        ([0.2, 0.9, 0.9], 2, [0, 1, 1]),
        ([3.0, 3.0 - 2**-50], 6, [3, 3]),  # a rounding error below an integer
        ([0.0, 0.0], 0, [0, 0]),
        ([5.0 + 1 / 6] * 12, 62, [6, 6] + [5] * 10),  # the start of the planted task
    ],
)
def test_rounding_by_hand(rho, total, ranks):
    assert largest_remainder(torch.tensor(rho, dtype=torch.float64), total).tolist() == ranks
