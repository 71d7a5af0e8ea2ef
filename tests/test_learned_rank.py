"""LearnedRank against a slow scalar implementation of its formulas, and what a run may rely on."""

import io
import json
import math
from dataclasses import asdict

import pytest
import torch

from lrlora_ops.methods import LearnedRank
from lrlora_ops.rank_table import RankTable

MAX_RANK = 6
SETTINGS = {"mean_rank": 2.6, "max_rank": MAX_RANK, "total_steps": 40, "seed": 3}


def make_tables(device="cpu"):
    """A dense layer, three experts of two projections each, a dense layer: five groups."""
    return {
        name: RankTable(experts, MAX_RANK, experts * MAX_RANK, device=device, num_projections=projections)
        for name, experts, projections in (("q_proj", 1, 1), ("experts", 3, 2), ("down_proj", 1, 1))
    }


def feed(tables, step):
    """Random sensitivities for every component, also for those that did not run."""
    generator = torch.Generator().manual_seed(1000 + step)
    for table in tables.values():
        table.gate.grad = torch.randn(table.gate.numel(), generator=generator).to(table.gate.device) - 0.3


def groups(tables, attribute):
    """Per group: its rank, its gates (the same in all projections), or its sensitivities, summed over them."""
    values = []
    for table in tables.values():
        value = getattr(table, attribute).detach()
        if attribute in ("gate", "sensitivity"):
            projections = value.double().view(table.num_projections, table.num_experts, -1)
            assert attribute == "sensitivity" or torch.equal(projections, projections[:1].expand_as(projections))
            value = projections.sum(0) if attribute == "sensitivity" else projections[0]
        values += value.tolist()
    return values


class ScalarLearnedRank:
    """The formulas, one number at a time."""

    def __init__(self, num_groups, mean_rank, max_rank, total_steps, seed, tau, warmup, freeze, lr, penalty):
        self.num_groups, self.max_rank, self.total_steps = num_groups, max_rank, total_steps
        self.tau, self.warmup, self.freeze, self.penalty = tau, warmup, freeze, penalty
        self.lr = min(max(10 * max_rank / ((freeze - warmup) * total_steps), 1e-3), 1.0) if lr is None else lr
        self.budget = round(mean_rank * num_groups)
        self.rho = [mean_rank if penalty is not None else self.budget / num_groups] * num_groups
        self.m, self.v, self.n, self.t = [0.0] * num_groups, 0.0, 0, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.k = self.sample()

    def sample(self):
        wide, narrow = self.tau
        self.width = wide * (narrow / wide) ** (self.t / (self.freeze * self.total_steps))
        drawn = torch.rand(self.num_groups, dtype=torch.float64, generator=self.generator).tolist()
        uniform = [1e-4 + (1 - 2e-4) * u for u in drawn]
        noisy = [r + self.width * math.log(u / (1 - u)) for r, u in zip(self.rho, uniform, strict=True)]
        return [min(max(round(value), 0), self.max_rank) for value in noisy]

    def step(self, sensitivity, loss=1.0):
        if self.t == 0:
            self.first_loss = loss
        if self.t >= self.warmup * self.total_steps:
            self.update([self.gradient(e, row) for e, row in enumerate(sensitivity)])
        self.t += 1
        if self.t < self.freeze * self.total_steps:
            self.k = self.sample()
        else:
            self.k = self.rounded()

    def gradient(self, group, sensitivity):
        total = 0.0
        for j in range(min(self.k[group] + 1, self.max_rank)):
            p = 1 / (1 + math.exp(-(self.rho[group] - j - 0.5) / self.width))
            total += sensitivity[j] * p * (1 - p) / self.width
        return total if self.penalty is None else total / self.first_loss + self.penalty

    def update(self, gradient):
        self.n += 1
        self.v = 0.99 * self.v + 0.01 * sum(g * g for g in gradient) / self.num_groups
        q = (self.t / self.total_steps - self.warmup) / (self.freeze - self.warmup)
        for e, g in enumerate(gradient):
            self.m[e] = 0.9 * self.m[e] + 0.1 * g
            d = (self.m[e] / (1 - 0.9**self.n)) / (math.sqrt(self.v / (1 - 0.99**self.n)) + 1e-12)
            self.rho[e] = min(max(self.rho[e] - self.lr * (1 - 0.9 * q) * d, 0.0), self.max_rank)
        if self.penalty is None:
            low, high = -float(self.max_rank), float(self.max_rank)
            for _ in range(200):
                middle = (low + high) / 2
                too_low = sum(min(max(r + middle, 0.0), self.max_rank) for r in self.rho) < self.budget
                low, high = (middle, high) if too_low else (low, middle)
            self.rho = [min(max(r + high, 0.0), self.max_rank) for r in self.rho]

    def rounded(self):
        ranks = [math.floor(r) for r in self.rho]
        total = self.budget if self.penalty is None else round(sum(self.rho))
        by_remainder = sorted(range(self.num_groups), key=lambda e: (ranks[e] - self.rho[e], e))
        for e in by_remainder[: total - sum(ranks)]:
            ranks[e] += 1
        return ranks


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mean_rank": 0.4, "seed": 4},  # ranks that live at zero
        {"mean_rank": 5.5, "tau": (3.0, 3.0)},  # ranks that live at the maximum, wide sampling
        {"warmup": 0.0, "freeze": 1.0, "lr": 0.05},
        {"penalty": 0.02},
    ],
    ids=str,
)
def test_every_step_is_the_formula(changed):
    settings = {**SETTINGS, "tau": (1.0, 0.3), "warmup": 0.05, "freeze": 0.8, "lr": None, "penalty": None, **changed}
    tables, slow = make_tables(), ScalarLearnedRank(5, **settings)
    policy = LearnedRank(**settings).policy(tables)
    for step in range(40):
        if step < settings["freeze"] * 40:
            assert groups(tables, "train_ranks") == [min(k + 1, MAX_RANK) for k in slow.k]
            assert groups(tables, "gate") == [[float(j != k) for j in range(MAX_RANK)] for k in slow.k]
            assert groups(tables, "ranks") == slow.rounded()
            feed(tables, step)
            slow.step(groups(tables, "sensitivity"), loss=0.7)
        policy.step(torch.tensor(0.7, dtype=torch.float64))
        assert policy.rho.tolist() == pytest.approx(slow.rho, abs=1e-9)
    assert groups(tables, "ranks") == groups(tables, "train_ranks") == slow.rounded()


@pytest.mark.parametrize("mean_rank", [0.2, 1.0, 2.6, 5.9])
def test_the_ranks_sum_to_the_budget_at_every_step(mean_rank):
    tables = make_tables()
    policy = LearnedRank(**{**SETTINGS, "mean_rank": mean_rank}).policy(tables)
    for step in range(40):
        feed(tables, step)
        policy.step()
        assert sum(groups(tables, "ranks")) == round(mean_rank * 5)
        assert policy.rho.sum().item() == pytest.approx(round(mean_rank * 5), abs=1e-9)
        assert all(0 <= live <= MAX_RANK for live in groups(tables, "train_ranks"))


def test_ranks_go_where_components_lower_the_loss():
    tables = make_tables()
    policy = LearnedRank(**SETTINGS).policy(tables)
    for _ in range(40):
        for name, table in tables.items():
            table.gate.grad = torch.full((table.gate.numel(),), -1.0 if name == "experts" else 0.0)
        policy.step()
    ranks = groups(tables, "ranks")
    assert sum(ranks[1:4]) == 13 and ranks[0] == ranks[4] == 0


def test_the_projections_of_an_expert_count_together():
    """The second projection outweighs the first, by turns of the expert: their sums rank the experts 3, 1, 2, 0."""
    table = RankTable(4, MAX_RANK, 4 * MAX_RANK, num_projections=2)
    policy = LearnedRank(**{**SETTINGS, "mean_rank": 3}).policy({"experts": table})
    sums = (1.0, -0.5, 0.0, -1.0)
    for _ in range(40):
        first = torch.tensor([-4.0, 4.0, -4.0, 4.0])
        c = torch.stack([first, torch.tensor(sums) - first])[:, :, None].expand(2, 4, MAX_RANK)
        table.gate.grad = c.flatten().clone()
        policy.step()
    ranks = table.ranks.tolist()
    assert ranks == [0, MAX_RANK, 0, MAX_RANK]
    assert table.gate.tolist() == [1.0] * (2 * 4 * MAX_RANK)


def test_the_scale_of_the_loss_does_not_matter():
    """A loss scaler or a sum instead of a mean multiplies every sensitivity by one factor."""
    trajectories = []
    for factor in (1.0, 1024.0):
        tables = make_tables()
        policy = LearnedRank(**SETTINGS).policy(tables)
        for step in range(40):
            feed(tables, step)
            for table in tables.values():
                table.gate.grad *= factor
            policy.step()
        trajectories.append(policy.rho.tolist())
    assert trajectories[0] == pytest.approx(trajectories[1], abs=1e-6)


def test_after_the_freeze_nothing_changes():
    tables = make_tables()
    policy = LearnedRank(**SETTINGS).policy(tables)
    for step in range(32):
        assert not policy.frozen and not all(gate == 1.0 for row in groups(tables, "gate") for gate in row)
        feed(tables, step)
        policy.step()
    assert policy.frozen
    ranks = groups(tables, "ranks")
    for step in range(32, 45):
        assert groups(tables, "ranks") == groups(tables, "train_ranks") == ranks
        assert groups(tables, "gate") == [[1.0] * MAX_RANK] * 5
        feed(tables, step)
        policy.step()


@pytest.mark.parametrize("mean_rank, rank", [(0.0, 0), (6.0, MAX_RANK), (100.0, MAX_RANK)])
def test_a_budget_of_nothing_or_everything_is_frozen_at_once(mean_rank, rank):
    tables = make_tables()
    policy = LearnedRank(mean_rank=mean_rank, max_rank=MAX_RANK).policy(tables)
    policy.step()  # needs no total_steps: there is nothing to learn
    assert groups(tables, "ranks") == groups(tables, "train_ranks") == [rank] * 5
    assert groups(tables, "gate") == [[1.0] * MAX_RANK] * 5


@pytest.mark.parametrize("saved_at", [0, 1, 17, 32, 36])  # new, in the warm-up, learning, just frozen, frozen
@pytest.mark.parametrize("penalty", [None, 0.02])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved_at, penalty):
    settings, loss = {**SETTINGS, "penalty": penalty}, torch.tensor(0.7)
    tables, resumed_tables = make_tables(), make_tables()
    policy = LearnedRank(**settings).policy(tables)
    resumed = LearnedRank(**{**settings, "seed": 99, "total_steps": None}).policy(resumed_tables)
    for step in range(saved_at):
        feed(tables, step)
        policy.step(loss)
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.total_steps = 40
    for step in range(saved_at, 40):
        for attribute in ("ranks", "train_ranks", "gate"):
            assert groups(tables, attribute) == groups(resumed_tables, attribute)
        for pair in ((tables, policy), (resumed_tables, resumed)):
            feed(pair[0], step)
            pair[1].step(loss)
    assert groups(tables, "ranks") == groups(resumed_tables, "ranks")
    assert policy.rho.tolist() == resumed.rho.tolist()


def test_a_state_of_other_adapters_is_refused():
    policy = LearnedRank(**SETTINGS).policy(make_tables())
    other = LearnedRank(**SETTINGS).policy({"q_proj": make_tables()["q_proj"]})
    with pytest.raises(ValueError, match="of other adapters"):
        other.load_state_dict(policy.state_dict())


def test_sampling_depends_on_the_seed_alone():
    """So all processes run the same prefixes, whatever else drew random numbers."""
    drawn = []
    for global_seed, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        tables = make_tables()
        policy = LearnedRank(**{**SETTINGS, "seed": seed}).policy(tables)
        drawn.append(policy.k.tolist())
        for step in range(10):
            feed(tables, step)
            policy.step()
            drawn[-1] += policy.k.tolist()
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_prefix_is_longer_than_j_with_the_probability_of_the_formula():
    """10,000 groups at rho = 3, tau = 1: the frequency of k > j is sigmoid(3 - j - 1/2), within 4 deviations."""
    table = RankTable(10_000, MAX_RANK, 10_000 * MAX_RANK)
    policy = LearnedRank(mean_rank=3, max_rank=MAX_RANK, total_steps=10).policy({"experts": table})
    for j in range(MAX_RANK):
        p = 1 / (1 + math.exp(-(3 - j - 0.5)))
        frequency = (policy.k > j).double().mean().item()
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / 10_000)


def test_a_step_never_reads_a_value_on_the_host():
    """On the meta device there are no values: any read, branch on data or copy to the host raises."""
    tables = make_tables("meta")
    policy = LearnedRank(**SETTINGS).policy(tables)
    for _ in range(36):
        for table in tables.values():
            table.gate.grad = torch.empty(table.gate.numel(), device="meta")
        policy.step()
    assert policy.frozen
    with pytest.raises((RuntimeError, NotImplementedError)):
        policy.rho.tolist()


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu_and_equals_the_cpu():
    """The model moves to the GPU after its adapters are made; from then on CUDA itself refuses to synchronize."""
    tables, cpu_tables = make_tables(), make_tables()
    policy, cpu_policy = LearnedRank(**SETTINGS).policy(tables), LearnedRank(**SETTINGS).policy(cpu_tables)
    for table in tables.values():
        table.to("cuda")
    for step in range(36):
        feed(tables, step)
        feed(cpu_tables, step)
        cpu_policy.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            policy.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert policy.rho.tolist() == pytest.approx(cpu_policy.rho.tolist(), abs=1e-9)
        assert groups(tables, "train_ranks") == groups(cpu_tables, "train_ranks")


def test_tensors_are_written_in_place():
    """Captured graphs and compiled code hold on to them."""
    tables = make_tables()
    policy = LearnedRank(**SETTINGS).policy(tables)
    before = {name: (t.ranks.data_ptr(), t.train_ranks.data_ptr(), t.gate.data_ptr()) for name, t in tables.items()}
    for step in range(36):
        feed(tables, step)
        policy.step()
    assert before == {n: (t.ranks.data_ptr(), t.train_ranks.data_ptr(), t.gate.data_ptr()) for n, t in tables.items()}
    assert all(table.gate.requires_grad and table.gate.is_leaf for table in tables.values())


def test_gradients_that_overflowed_count_as_zero():
    """In the step after them too: nothing of them stays in the moments."""
    trajectories = []
    for bad in (math.inf, -math.inf, math.nan, 0.0):
        tables = make_tables()
        policy = LearnedRank(**SETTINGS).policy(tables)
        for step in range(40):
            feed(tables, step)
            if step == 10:
                tables["q_proj"].gate.grad[:] = bad
                tables["experts"].gate.grad[:] = bad
            policy.step()
        trajectories.append(policy.rho.tolist())
    assert trajectories == trajectories[:1] * 4


def test_adapters_that_got_no_gradient_count_as_zero():
    tables = make_tables()
    policy = LearnedRank(**SETTINGS).policy(tables)
    for _ in range(40):
        policy.step()
    assert policy.rho.tolist() == pytest.approx([2.6] * 5)


def test_the_length_of_the_run_may_come_late():
    tables, late_tables = make_tables(), make_tables()
    policy = LearnedRank(**SETTINGS).policy(tables)
    late = LearnedRank(**{**SETTINGS, "total_steps": None}).policy(late_tables)
    with pytest.raises(RuntimeError, match=r"pass total_steps, .* adapters.callback\(\)"):
        late.step()
    late.total_steps = 40
    for step in range(40):
        assert groups(tables, "train_ranks") == groups(late_tables, "train_ranks")
        for pair in ((tables, policy), (late_tables, late)):
            feed(pair[0], step)
            pair[1].step()
    assert groups(tables, "ranks") == groups(late_tables, "ranks")


def test_a_price_moves_the_sum():
    sums = []
    for penalty in (0.0, 1e3):
        tables = make_tables()
        policy = LearnedRank(**{**SETTINGS, "penalty": penalty}).policy(tables)
        for _ in range(40):
            for table in tables.values():
                table.gate.grad = torch.full((table.gate.numel(),), -0.1)
            policy.step(loss=torch.tensor(1.0))
        sums.append(sum(groups(tables, "ranks")))
    assert sums == [5 * MAX_RANK, 0]


def test_a_price_needs_the_first_loss():
    policy = LearnedRank(**{**SETTINGS, "penalty": 0.1}).policy(make_tables())
    with pytest.raises(ValueError, match=r"step\(loss=loss\)"):
        policy.step()


def test_settings_survive_json():
    method = LearnedRank(mean_rank=4, tau=(2.0, 0.5), total_steps=7)
    assert LearnedRank(**json.loads(json.dumps(asdict(method)))) == method
    assert hash(method) == hash(LearnedRank(mean_rank=4, tau=(2.0, 0.5), total_steps=7))


@pytest.mark.parametrize("mean_rank, initial_rank", [(2.6, 3), (100.0, 32), (0.0, 0)])
def test_a_new_adapter_starts_at_the_mean(mean_rank, initial_rank):
    assert LearnedRank(mean_rank=mean_rank).initial_rank == initial_rank
