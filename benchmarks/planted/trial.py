"""One arm of one planted task: train, test, compare the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.planted.arms import ARMS
from benchmarks.planted.cases import CASES
from lrlora_ops import LearnedRank

STEPS, LR = 1000, 5e-3
TEST_BATCHES = 16  # of a training batch's size


@dataclass(frozen=True)
class Result:
    """One arm: the final test loss, the ranks in the order of the groups, and the training losses.

    The ranks of ``sinc`` are stable ranks.
    """

    case: str
    seed: int
    method: str
    loss: float
    spearman: float
    budget: int
    ranks: list[float]
    planted: list[int]
    history: list[float]

    def row(self) -> dict[str, object]:
        """All but the training losses."""
        return {key: value for key, value in asdict(self).items() if key != "history"}

    def freeze_jump(self, freeze: float = LearnedRank.freeze) -> float:
        """The first training loss after the ranks froze, over the mean of the ten before."""
        first = math.ceil(freeze * len(self.history))
        return self.history[first] * 10 / sum(self.history[first - 10 : first])


def run(case_name: str, seed: int, method: str, steps: int = STEPS) -> Result:
    """Train one arm on fresh data at every step, and test it."""
    case = CASES[case_name](seed)
    model, data = case.student, torch.Generator().manual_seed(seed)
    test = case.batch(TEST_BATCHES * case.rows, data)
    without_adapter = error(model, case.teacher, test).item()

    torch.manual_seed(seed)
    adapters = ARMS[method](case, steps)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=LR, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    model.train()
    for _ in range(steps):
        loss = error(model, case.teacher, case.batch(case.rows, data))
        loss.backward()
        adapters.step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(loss.item())

    model.eval()
    with torch.no_grad():
        final = error(model, case.teacher, test).item() / without_adapter
    at_the_end = adapters.ranks()
    ranks = [rank for name in case.planted for rank in at_the_end[name].flatten().tolist()]
    planted = [rank for of_layer in case.planted.values() for rank in of_layer]
    return Result(case_name, seed, method, final, spearman(ranks, planted), case.budget, ranks, planted, history)


def error(model: nn.Module, teacher: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance to the teacher's output."""
    with torch.no_grad():
        wanted = teacher(*batch)
    return nn.functional.mse_loss(model(*batch), wanted)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation with average ranks for ties; 0 if one of the two is constant."""

    def average_ranks(values: Sequence[float]) -> Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        return (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2

    correlation = torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1]
    return correlation.nan_to_num().item()
