"""DynamicRank at the ends of a run, beside other methods, and what it refuses."""

import json
import warnings
from dataclasses import asdict

import pytest

from lrlora_ops.methods import DynamicRank, LearnedRank
from lrlora_ops.rank_table import RankTable
from tests._dynamic_rank import SETTINGS, all_ranks, make_tables, random_statistics, train


def test_ranks_that_have_nowhere_to_grow_are_frozen_at_once():
    method = DynamicRank(initial_rank=8, target_rank=8)
    tables = make_tables(method)
    policy = method.policy(tables)
    policy.step()  # needs no total_steps: there is nothing to decide
    assert policy.frozen and all_ranks(tables)["layers.2"] == [8, 8, 8]


def test_after_the_last_growth_nothing_changes():
    method = DynamicRank(**SETTINGS)
    tables = make_tables(method)
    policy = method.policy(tables)
    train(policy, tables, random_statistics, range(51))
    assert not policy.frozen
    train(policy, tables, random_statistics, [51])
    ranks = all_ranks(tables)
    assert policy.frozen
    train(policy, tables, random_statistics, range(52, 80))
    assert all_ranks(tables) == ranks


def test_the_length_of_the_run_may_come_late():
    method = DynamicRank(**SETTINGS)
    tables, late_tables = make_tables(method), make_tables(method)
    policy, late = method.policy(tables), DynamicRank(**{**SETTINGS, "total_steps": None}).policy(late_tables)
    with pytest.raises(RuntimeError, match=r"pass total_steps, .* adapters.callback\(\)"):
        late.step()
    late.total_steps = 60
    train(policy, tables, random_statistics, range(60))
    train(late, late_tables, random_statistics, range(60))
    assert all_ranks(tables) == all_ranks(late_tables)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"total_steps": 5, "interval": 5}, None),  # growth at step 0 alone, and one growth of two is enough
        ({"total_steps": 4, "interval": 5}, "a run of 4 steps has no growth: .* lower interval or warmup"),
        ({"warmup": 0.95}, "the first would be at step 57"),
        ({"interval": 20, "target_rank": 8, "grow_fraction": 0.0}, "2 growths of at most 1 .* from rank 2 to 8; lower"),
        ({"interval": 20, "target_rank": 8, "grow_fraction": 0.0, "variant": "released"}, None),
    ],
    ids=str,
)
def test_runs_too_short_to_grow_in(changed, message):
    method = DynamicRank(**{**SETTINGS, **changed})
    if message is None:
        method.policy(make_tables(method))
        return
    with pytest.raises(ValueError, match=message):
        method.policy(make_tables(method))
    late = DynamicRank(**{**asdict(method), "total_steps": None}).policy(make_tables(method))
    late.total_steps = method.total_steps
    with pytest.raises(ValueError, match=message):
        late.step()


def test_a_pool_holds_what_the_variant_may_hand_out():
    assert DynamicRank().pool_rank == 16
    assert DynamicRank(variant="released").pool_rank == 19  # growth stops at or above the target, one growth late
    assert DynamicRank(variant="released", target_rank=31).pool_rank == 32


def test_dense_layers_are_told_of_learned_rank():
    method = DynamicRank(**SETTINGS)
    dense = {f"layers.{i}.q_proj": (1, 1) for i in range(4)}
    with pytest.warns(UserWarning, match=r"q_proj and 1 more has one: .* use LearnedRank for dense layers"):
        policy = method.policy(tables := make_tables(method, dense))
    train(policy, tables, random_statistics, range(60))
    assert all_ranks(tables) == {name: [4] for name in dense}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.policy(make_tables(method))


def test_one_model_may_hold_both_methods():
    """LearnedRank on the dense layer, DynamicRank on the experts: neither touches what is not its own."""
    dynamic, learned = DynamicRank(**SETTINGS), LearnedRank(mean_rank=3, max_rank=6, total_steps=60)
    experts, dense = make_tables(dynamic), {f"q_proj.{i}": RankTable(1, 6, 6) for i in range(3)}
    policies = (dynamic.policy(experts), learned.policy(dense))
    for step in range(60):
        random_statistics(experts | dense, step)
        for policy in policies:
            policy.step()
    assert [sum(ranks) for ranks in all_ranks(experts).values()] == [20, 20, 12]
    assert sum(sum(ranks) for ranks in all_ranks(dense).values()) == 9
    alone = make_tables(dynamic)
    train(dynamic.policy(alone), alone, random_statistics, range(60))
    assert all_ranks(alone) == all_ranks(experts)


def test_settings_survive_json():
    method = DynamicRank(total_steps=7, variant="released", score="saliency")
    assert DynamicRank(**json.loads(json.dumps(asdict(method)))) == method
    assert hash(method) == hash(DynamicRank(total_steps=7, variant="released", score="saliency"))
