"""FixedRank: a rank that nothing changes."""

import pytest
import torch

from lrlora_ops.methods import FixedRank
from lrlora_ops.rank_table import RankTable


def test_a_step_changes_nothing():
    table = RankTable.uniform(2, 3, max_rank=4)
    table.gate.grad = torch.ones(8)
    policy = FixedRank(3).policy({"layer": table})
    policy.step()
    policy.load_state_dict(policy.state_dict())
    assert table.ranks.tolist() == table.train_ranks.tolist() == [3, 3]
    assert table.gate.tolist() == [1.0] * 8


def test_an_adapter_of_rank_0_is_legal():
    method = FixedRank(0)
    assert (method.initial_rank, method.max_rank) == (0, 0)


@pytest.mark.parametrize("rank", [-1, 2.5, "8"])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match=r"rank is .* must be an integer of at least 0"):
        FixedRank(rank)
