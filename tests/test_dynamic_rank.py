"""DynamicRank against a slow plain-Python implementation of its formulas, and what a run may rely on."""

import copy
import io
import json
import math
import warnings
from dataclasses import asdict

import pytest
import torch

from lrlora_ops.methods import DynamicRank, LearnedRank
from lrlora_ops.rank_table import RankTable

SHAPES = {"layers.0": (5, 2), "layers.1": (5, 2), "layers.2": (3, 1)}  # experts, projections; two alike, one other
SETTINGS = {
    "initial_rank": 2,
    "target_rank": 4,
    "max_rank": 8,
    "total_steps": 60,
    "interval": 5,
    "warmup": 0.1,
    "grow_fraction": 0.3,
}
VARIANTS = pytest.mark.parametrize("variant", ["exact", "released"])
SCORES = pytest.mark.parametrize("score", ["paper", "saliency"])


def make_tables(method, shapes=SHAPES, device="cpu"):
    """One table per layer, with the pool that the method asks for, at its initial rank."""
    tables = {}
    for name, (experts, projections) in shapes.items():
        table = RankTable(experts, method.max_rank, experts * method.pool_rank, device, projections)
        if device != "meta":
            table.set_ranks([method.initial_rank] * experts)
        tables[name] = table
    return tables


def random_statistics(tables, step):
    """Rows for about two thirds of the experts, weights of them, sensitivities of every pool row."""
    generator = torch.Generator().manual_seed(1000 + step)
    for table in tables.values():
        rows = torch.randint(-4, 9, (table.num_experts,), generator=generator).clamp(min=0).float()
        table.demand.grad = torch.stack([rows, rows * torch.rand(table.num_experts, generator=generator)])
        table.gate.grad = torch.randn(table.gate.numel(), generator=generator)


def equal_statistics(tables, step):
    """Nothing tells the experts apart; powers of two, so that equal means stay equal in floating point."""
    for table in tables.values():
        table.demand.grad = torch.full((2, table.num_experts), 4.0)
        table.gate.grad = torch.full((table.gate.numel(),), -0.5)


def overflowing_statistics(tables, step):
    """Every seventh step as an fp16 step that the loss scaler skips, in parts of the layers."""
    random_statistics(tables, step)
    if step % 7 == 0:
        for table in tables.values():
            table.gate.grad[::3] = math.inf
            table.gate.grad[1::3] = -math.nan


def train(policy, tables, statistics, steps):
    for step in steps:
        statistics(tables, step)
        policy.step()


def all_ranks(tables):
    return {name: table.ranks.tolist() for name, table in tables.items()}


class SlowLayer:
    """The formulas for one layer, one number at a time; it reads the table's statistics and never its ranks."""

    def __init__(self, method, num_experts, num_projections):
        self.method, self.experts, self.projections = method, range(num_experts), range(num_projections)
        self.released = method.variant == "released"
        self.ranks = [method.initial_rank] * num_experts
        self.f = [0.0] * num_experts
        self.g = [[[0.0] * method.max_rank for _ in self.experts] for _ in self.projections]
        self.cap = max(1, math.ceil(method.grow_fraction * (method.max_rank - method.initial_rank)))

    def step(self, t, table):
        rows, weights = table.demand.grad.tolist()
        c = table.gate.grad.view(len(self.projections), -1).tolist()
        owned = table.components.tolist()
        for e in self.experts:
            self.f[e] = self.method.decay * self.f[e] + (rows if self.released else weights)[e]
            for p in self.projections:
                for j in range(self.ranks[e]):
                    for _ in range(2 if self.released else 1):
                        saliency = abs(c[p][owned[e][j]])
                        if rows[e] > 0 and math.isfinite(saliency):
                            self.g[p][e][j] = self.method.decay * self.g[p][e][j] + (1 - self.method.decay) * saliency
        start, end = math.floor(self.method.warmup * self.method.total_steps), self.method.total_steps
        end -= self.method.interval
        events = (end - start) // self.method.interval + 1
        if start <= t <= end and (t - start) % self.method.interval == 0:
            grown = self.allocate(events, events - (t - start) // self.method.interval)
            self.ranks = [r + d for r, d in zip(self.ranks, grown, strict=True)]
            if any(grown):
                self.g = [[[0.0] * self.method.max_rank for _ in self.experts] for _ in self.projections]

    def score(self, e):
        def share(values):
            return values[e] / sum(values) + 1e-6 if sum(values) else 1e-6

        means = [
            sum(sum(self.g[p][i][: self.ranks[i]]) / max(self.ranks[i], 1) for p in self.projections)
            / len(self.projections)
            for i in self.experts
        ]
        if self.method.score == "saliency":
            return share(means)
        return share(self.f) * share(means) / (self.ranks[e] + 1) ** self.method.gamma

    def allocate(self, events, left):
        n, m = len(self.projections), self.method
        target, current = n * len(self.experts) * m.target_rank, n * sum(self.ranks)
        if self.released:
            quota = math.ceil(n * len(self.experts) * (m.target_rank - m.initial_rank) / events)
            quota = quota if current < target else 0
        else:
            quota = math.ceil((target - current) / left) // n
        order = sorted(self.experts, key=lambda e: (-self.score(e), e))
        spare = [m.max_rank - self.ranks[e] for e in order]
        grown = []
        for s in spare:
            take = min(self.cap, s, quota - sum(grown))
            if not self.released:
                while take and not self.reachable(spare, [*grown, take], quota, (target - current) // n, left):
                    take -= 1
            grown.append(take)
        return [grown[order.index(e)] for e in self.experts]

    def reachable(self, spare, chosen, quota, missing, left):
        """Whether the caps allow the target still, if the rest of the quota goes where room would expire unused."""
        later, grown = self.cap * (left - 1), chosen + [0] * (len(spare) - len(chosen))
        for keep in (later, 0):
            for i in range(len(chosen), len(spare)):
                most = max(0, min(self.cap, spare[i] - keep))
                grown[i] += max(0, min(most - grown[i], quota - sum(grown)))
        return missing - sum(grown) <= sum(min(later, s - d) for s, d in zip(spare, grown, strict=True))


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


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"initial_rank": -1}, "initial_rank is -1; it must be an integer of at least 0"),
        ({"initial_rank": 8.0}, "initial_rank is 8.0"),
        ({"max_rank": 0, "initial_rank": 0, "target_rank": 0}, "max_rank is 0; it must be an integer of at least 1"),
        ({"target_rank": 7}, "target_rank is 7; it must be an integer from initial_rank, 8, to max_rank, 32"),
        ({"target_rank": 33}, "target_rank is 33"),
        ({"target_rank": 16.5}, "target_rank is 16.5"),
        ({"total_steps": 0}, "total_steps is 0; it must be at least 1, or None"),
        ({"interval": 0}, "interval is 0; it must be an integer of at least 1"),
        ({"warmup": 1.0}, "warmup is 1.0; it must be at least 0 and less than 1"),
        ({"gamma": -0.1}, "gamma is -0.1; it must be a number of at least 0"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"decay": 1.0}, "decay is 1.0; it must be at least 0 and less than 1"),
        ({"grow_fraction": 1.5}, "grow_fraction is 1.5; it must be from 0 to 1"),
        ({"score": "saliancy"}, 'score is \'saliancy\'; it must be "paper" or "saliency"'),
        ({"variant": "paper"}, 'variant is \'paper\'; it must be "exact" or "released"'),
    ],
    ids=str,
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        DynamicRank(**setting)


@pytest.mark.parametrize(
    "tables, message",
    [
        ({}, "no rank table"),
        ({"experts": RankTable(4, 7, 28)}, "experts has max_rank 7, but DynamicRank has 8; raise the adapter's"),
        ({"experts": RankTable(4, 8, 15)}, "a pool of 15 rows for 4 experts, .* needs 4 .* with pool_rank=4"),
    ],
    ids=["none", "max_rank", "pool"],
)
def test_tables_that_cannot_grow(tables, message):
    with pytest.raises(ValueError, match=message):
        DynamicRank(**SETTINGS).policy(tables)


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
