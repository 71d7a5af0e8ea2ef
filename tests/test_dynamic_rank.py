"""DynamicRank against a slow plain-Python implementation of its formulas, and what a run may rely on."""

import copy
import io
from dataclasses import asdict

import pytest
import torch

from lrlora_ops.methods import DynamicRank
from tests._dynamic_rank import (
    SCORES,
    SETTINGS,
    SHAPES,
    VARIANTS,
    SlowLayer,
    all_ranks,
    equal_statistics,
    make_tables,
    overflowing_statistics,
    random_statistics,
    train,
)


@VARIANTS
@SCORES
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"initial_rank": 0, "gamma": 0.0},  # experts that start with nothing
        {"grow_fraction": 0.0, "interval": 3, "decay": 0.5},  # one component at a time
        {"grow_fraction": 1.0, "interval": 17},  # three growths, from the first to the highest rank at once
        {"target_rank": 8, "interval": 9, "grow_fraction": 0.2},  # everybody to the maximum: the caps bind
        {"target_rank": 7, "interval": 4, "grow_fraction": 0.0},  # nearly so
        {"warmup": 0.0, "target_rank": 3},  # growth in the very first step
    ],
    ids=str,
)
@pytest.mark.parametrize("statistics", [random_statistics, equal_statistics, overflowing_statistics])
def test_every_rank_is_the_formulas(variant, score, changed, statistics):
    if statistics is equal_statistics:
        changed = {**changed, "decay": 0.5}
    method = DynamicRank(**{**SETTINGS, **changed, "variant": variant, "score": score})
    tables = make_tables(method)
    policy = method.policy(tables)
    slow = {name: SlowLayer(method, *shape) for name, shape in SHAPES.items()}
    for step in range(60):
        statistics(tables, step)
        for name, table in tables.items():
            slow[name].step(step, table)
        policy.step()
        assert all_ranks(tables) == {name: layer.ranks for name, layer in slow.items()}
    assert all_ranks(tables) != {name: [method.initial_rank] * shape[0] for name, shape in SHAPES.items()}


def module_ranks_after_growths(variant):
    """The paper's defaults: 64 experts of two projections, 3750 steps; the sum of ranks over all projections."""
    method = DynamicRank(total_steps=3750, variant=variant)
    tables = make_tables(method, {"experts": (64, 2)})
    policy, totals = method.policy(tables), {}
    for step in range(3750):
        if step >= 100:  # what came long before the first growth has decayed
            random_statistics(tables, step)
        policy.step()
        total = 2 * tables["experts"].ranks.sum().item()
        if total != [1024, *totals.values()][-1]:
            totals[step] = total
        assert policy.frozen == (step >= 3512)
    return totals


def test_released_growth_ends_after_nine_of_eighteen_at_2050():
    totals = module_ranks_after_growths("released")
    assert list(totals) == [112 + 200 * i for i in range(9)]
    assert list(totals.values()) == [1024 + 2 * 57 * (i + 1) for i in range(9)]
    assert totals[1712] == 2050


def test_exact_growth_uses_all_eighteen_and_ends_at_2048():
    totals = module_ranks_after_growths("exact")
    assert list(totals) == [112 + 200 * i for i in range(18)]
    assert totals[112] == 1024 + 56  # ceil(1024 / 18) = 57, and one cannot be shared by two projections
    assert totals[3512] == 64 * 2 * 16


@VARIANTS
@pytest.mark.parametrize("seed", range(5))
def test_growth_keeps_what_experts_have(variant, seed):
    """Ranks never shrink nor pass the maximum; experts keep their rows; rows that become live never were."""
    method = DynamicRank(**{**SETTINGS, "target_rank": 6, "variant": variant})
    tables = make_tables(method)
    policy = method.policy(tables)
    owned = {name: [rows[:2] for rows in table.components.tolist()] for name, table in tables.items()}
    for step in range(60):
        random_statistics(tables, 100 * seed + step)
        policy.step()
        for name, table in tables.items():
            ranks = table.ranks.tolist()
            now = [rows[:rank] for rows, rank in zip(table.components.tolist(), ranks, strict=True)]
            for before, after in zip(owned[name], now, strict=True):
                assert after[: len(before)] == before and len(after) <= 8 and len(after) - len(before) <= method.cap
            live = [row for rows in now for row in rows]
            assert len(set(live)) == len(live) and all(0 <= row < table.pool_size for row in live)
            assert torch.equal(table.train_ranks, table.ranks) and table.gate.eq(1).all()
            owned[name] = now
    for name, table in tables.items():
        total = table.ranks.sum().item()
        assert total == SHAPES[name][0] * 6 if variant == "exact" else total >= SHAPES[name][0] * 6


@pytest.mark.parametrize("shape, quota", [((3, 2), 1), ((3, 1), 2), ((3, 5), 1)])
def test_exact_never_passes_the_target(shape, quota):
    """P * 3 * (3 - 2) components in two growths: what the projections cannot share is left for the last one."""
    method = DynamicRank(initial_rank=2, target_rank=3, max_rank=8, total_steps=30, interval=10, warmup=0.2)
    tables = make_tables(method, {"experts": shape})
    policy = method.policy(tables)
    train(policy, tables, random_statistics, range(15))
    assert tables["experts"].ranks.sum().item() == 6 + quota
    train(policy, tables, random_statistics, range(15, 30))
    assert tables["experts"].ranks.sum().item() == 9 == tables["experts"].pool_size


def test_the_target_is_met_though_one_expert_is_always_ahead():
    """Two experts to the maximum in ten growths of at most two: served by score alone, the second ends at 14."""
    method = DynamicRank(0, 16, 16, total_steps=11, interval=1, warmup=0.1, grow_fraction=0.1, score="saliency")
    tables = make_tables(method, {"experts": (2, 1)})
    policy, table, history = method.policy(tables), tables["experts"], []
    for _ in range(11):
        table.demand.grad = torch.ones(2, 2)
        table.gate.grad = torch.zeros(32)
        table.gate.grad[table.components[0, : table.ranks[0]].long()] = 1.0
        policy.step()
        history.append(table.ranks.tolist())
    assert history[-1] == [16, 16]
    assert history[1][0] == history[1][1] == 2 and all(a >= b for a, b in history)


@VARIANTS
def test_growth_goes_to_what_matters(variant):
    """Expert 1 has demand and sensitivity, expert 3 demand alone, expert 4 never a row; 0 and 2 tie."""
    method = DynamicRank(**{**SETTINGS, "variant": variant})
    tables = make_tables(method, {"experts": (5, 2)})
    policy, table = method.policy(tables), tables["experts"]
    for _ in range(60):
        table.demand.grad = torch.tensor([1.0, 9.0, 1.0, 9.0, 0.0]).repeat(2, 1)
        c = torch.zeros(2, table.pool_size)
        for expert, size in enumerate((1.0, 5.0, 1.0, 0.1, 5.0)):
            c[:, table.components[expert, : table.ranks[expert]].long()] = size
        table.gate.grad = c.flatten()
        policy.step()
    ranks = table.ranks.tolist()
    assert ranks[1] == 8 and ranks[4] == 2 and ranks[1] > ranks[0] >= ranks[2] >= ranks[3]


@VARIANTS
@SCORES
@pytest.mark.parametrize("saved_at", [0, 4, 6, 7, 30, 52, 58])  # new, warm-up, around a growth, within, after the last
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(variant, score, saved_at):
    method = DynamicRank(**{**SETTINGS, "variant": variant, "score": score})
    tables, resumed_tables = make_tables(method), make_tables(method)
    policy = method.policy(tables)
    resumed = DynamicRank(**{**asdict(method), "total_steps": None}).policy(resumed_tables)
    train(policy, tables, random_statistics, range(saved_at))
    file = io.BytesIO()
    torch.save((policy.state_dict(), {name: table.state_dict() for name, table in tables.items()}), file)
    file.seek(0)
    state, table_states = torch.load(file, weights_only=True)
    for name, table in resumed_tables.items():
        table.load_state_dict(table_states[name])
    resumed.load_state_dict(state)
    for step in range(saved_at, 60):
        assert policy.frozen == resumed.frozen
        train(policy, tables, random_statistics, [step])
        train(resumed, resumed_tables, random_statistics, [step])
        for name, table in tables.items():
            assert torch.equal(table.ranks, resumed_tables[name].ranks)
            assert torch.equal(table.components, resumed_tables[name].components)
    state, resumed_state = policy.state_dict(), resumed.state_dict()
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(resumed_state[k])) for k, v in state.items())


def test_a_saved_state_does_not_follow_the_run():
    method = DynamicRank(**SETTINGS)
    tables = make_tables(method)
    policy = method.policy(tables)
    train(policy, tables, random_statistics, range(5))
    state = policy.state_dict()
    before = copy.deepcopy(state)
    train(policy, tables, random_statistics, range(5, 20))
    assert all(torch.equal(before[key], state[key]) for key in state if isinstance(state[key], torch.Tensor))


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers.0": (5, 2), "layers.1": (5, 2)},  # a layer less
        {"layers.0": (5, 2), "layers.1": (5, 2), "layers.9": (3, 1)},  # another name
        {"layers.0": (5, 2), "layers.1": (5, 2), "layers.2": (3, 2)},  # another number of projections
        {"layers.0": (5, 2), "layers.1": (3, 2), "layers.2": (3, 1)},  # another number of experts
    ],
)
def test_a_state_of_other_adapters_is_refused(shapes):
    method = DynamicRank(**SETTINGS)
    other = method.policy(make_tables(method, shapes))
    with pytest.raises(ValueError, match="of other adapters"):
        other.load_state_dict(method.policy(make_tables(method)).state_dict())


@VARIANTS
def test_a_step_never_reads_a_value_on_the_host(variant):
    """On the meta device there are no values: any read, branch on data or copy to the host raises."""
    method = DynamicRank(**{**SETTINGS, "variant": variant, "total_steps": 20})
    tables = make_tables(method, device="meta")
    policy = method.policy(tables)
    for _ in range(20):
        for table in tables.values():
            table.gate.grad, table.demand.grad = torch.empty_like(table.gate), torch.empty_like(table.demand)
        policy.step()
    assert policy.frozen
    with pytest.raises((RuntimeError, NotImplementedError)):
        policy.layers[0].demand.tolist()


@pytest.mark.gpu
@VARIANTS
def test_a_step_never_waits_for_the_gpu_and_equals_the_cpu(variant):
    """The model moves to the GPU after its adapters are made; from then on CUDA itself refuses to synchronize."""
    method = DynamicRank(**{**SETTINGS, "variant": variant})
    tables, cpu_tables = make_tables(method), make_tables(method)
    policy, cpu_policy = method.policy(tables), method.policy(cpu_tables)
    for table in tables.values():
        table.to("cuda")
    for step in range(60):
        train(cpu_policy, cpu_tables, random_statistics, [step])
        for name, table in tables.items():
            table.gate.grad = cpu_tables[name].gate.grad.cuda()
            table.demand.grad = cpu_tables[name].demand.grad.cuda()
        torch.cuda.set_sync_debug_mode("error" if step > 6 else "default")
        try:
            policy.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all_ranks(tables) == all_ranks(cpu_tables)


def test_tensors_are_written_in_place():
    """Captured graphs and compiled code hold on to them."""
    method = DynamicRank(**SETTINGS)
    tables = make_tables(method)
    policy = method.policy(tables)

    def addresses():
        names = ("components", "ranks", "train_ranks", "gate", "demand")
        return {layer: [getattr(table, name).data_ptr() for name in names] for layer, table in tables.items()}

    before = addresses()
    train(policy, tables, random_statistics, range(60))
    assert before == addresses() and policy.frozen


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-12])
def test_the_scale_of_the_loss_does_not_matter(factor):
    """A loss scaler or a sum instead of a mean multiplies every sensitivity by one factor."""

    def scaled_statistics(tables, step):
        random_statistics(tables, step)
        for table in tables.values():
            table.gate.grad *= factor

    method, results = DynamicRank(**SETTINGS), []
    for statistics in (random_statistics, scaled_statistics):
        tables = make_tables(method)
        train(method.policy(tables), tables, statistics, range(60))
        results.append(all_ranks(tables))
    assert results[0] == results[1]


def test_adapters_without_statistics_still_reach_the_target():
    """Experts that report nothing, as in a run that never calls backward, all tie: the lower ids grow first."""
    method = DynamicRank(**SETTINGS)
    tables = make_tables(method, {"experts": (300, 1)})
    policy = method.policy(tables)
    for step in range(60):
        policy.step()
        if step == 6:
            assert tables["experts"].ranks.tolist() == [4] * 30 + [2] * 270
    assert tables["experts"].ranks.sum().item() == 300 * 4
