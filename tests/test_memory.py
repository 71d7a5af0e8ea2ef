"""What adapters hold: the arithmetic of the budget, counted on real layer sizes without allocating them."""

from pathlib import Path

import pytest

from benchmarks.memory import MAX_RANK, MEAN_RANK, budget_bytes, held, table
from benchmarks.shapes import ExpertsShape, olmoe, qwen3

pytest.importorskip("peft")
SHAPES = [olmoe(1024), qwen3(1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_cost_follows_the_budget(shape: ExpertsShape):
    """Ranks that may grow to 64 hold, with gradients and AdamW's state, what their mean of 16 needs."""
    budget = budget_bytes(shape, MEAN_RANK, layers=1)
    ours, base = (held(shape, arm, layers=1) for arm in ("lrlora", "base"))
    assert (ours.adapters, ours.gradients, ours.optimizer) == (budget, budget, 2 * budget)
    # U of both projections, in bf16; what else backward needs, the frozen experts keep as well.
    assert ours.saved <= base.saved + 2 * shape.rows * MAX_RANK * 2


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_what_peers_hold(shape: ExpertsShape):
    """PEFT holds the same for the same ranks, four times as much to mask ranks up to 64, and more for backward."""
    ours, peft, masked = (held(shape, arm, layers=1) for arm in ("lrlora", "PEFT", "masked"))
    assert (peft.adapters, peft.optimizer) == (ours.adapters, ours.optimizer)
    assert masked.adapters == MAX_RANK // MEAN_RANK * ours.adapters
    assert min(peft.saved, masked.saved) > 1.3 * ours.saved


def test_the_page_has_the_table():
    page = Path(__file__).parents[1] / "docs" / "distributed.md"
    assert table() in page.read_text()
