"""FixedRank: a rank that nothing changes."""

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
