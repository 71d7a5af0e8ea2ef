"""Tables, streams of statistics, and DR-LoRA's formulas in slow plain Python."""

import math

import pytest
import torch

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
