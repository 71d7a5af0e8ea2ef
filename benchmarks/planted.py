"""Planted ranks: a frozen network is fine-tuned towards a copy of itself whose layers moved by known ranks.

    python -m benchmarks.planted --case dense --seeds 0 1 2 --methods uniform learned oracle --json FILE

All arms spend the same budget of rank components. ``uniform`` spreads it evenly, ``oracle`` gives each layer the
rank that was planted, ``learned`` has to find out. The loss is the test error over the error without an adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrlora_ops import FixedRank, LearnedRank, apply_lora
from lrlora_ops.methods import Method

STEPS, BATCH, TEST_ROWS, LR = 1000, 128, 2048, 5e-3
MAX_RANK = 24


@dataclass(frozen=True)
class Case:
    """One task: reach the teacher from the student, which differ by deltas of the planted ranks."""

    student: nn.Module
    teacher: nn.Module
    planted: dict[str, int]  # layer name -> rank of its delta, in the order of the network
    features: int

    @property
    def budget(self) -> int:
        return sum(self.planted.values())


@dataclass(frozen=True)
class Result:
    """One arm: the final test loss, the ranks in the order of the layers, and the training losses."""

    case: str
    seed: int
    method: str
    loss: float
    spearman: float
    budget: int
    ranks: list[int]
    planted: list[int]
    history: list[float]

    def row(self) -> dict[str, object]:
        """All but the training losses."""
        return {key: value for key, value in asdict(self).items() if key != "history"}

    def freeze_jump(self, freeze: float = LearnedRank.freeze) -> float:
        """The first training loss after the ranks froze, over the mean of the ten before."""
        first = math.ceil(freeze * len(self.history))
        return self.history[first] * 10 / sum(self.history[first - 10 : first])


class Block(nn.Module):
    """``h + down(gelu(up(norm(h))))``, with frozen random weights of variance 1 / features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, elementwise_affine=False)
        self.up = nn.Linear(features, features, bias=False)
        self.down = nn.Linear(features, features, bias=False)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=features**-0.5).requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(nn.functional.gelu(self.up(self.norm(h))))


def dense(seed: int, ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16) * 2) -> Case:
    """Residual blocks of two layers of 64 x 64 each; deltas of the given ranks in random order.

    A delta is a product of two Gaussian matrices, scaled to a quarter of the Frobenius norm of a base weight.
    """
    torch.manual_seed(seed)
    features = 64
    student = nn.Sequential(*(Block(features) for _ in range(len(ranks) // 2)))
    teacher = copy.deepcopy(student)
    layers = {name: layer for name, layer in teacher.named_modules() if isinstance(layer, nn.Linear)}
    planted = {name: ranks[i] for name, i in zip(layers, torch.randperm(len(ranks)).tolist(), strict=True)}
    for name, rank in planted.items():
        if rank:
            delta = torch.randn(features, rank) @ torch.randn(rank, features)
            layers[name].weight.add_(delta * (features**0.5 / 4) / delta.norm())
    return Case(student, teacher, planted, features)


def uniform(case: Case, steps: int) -> dict[str, FixedRank]:
    """The budget spread evenly; the first layers get the remainder."""
    rank, extra = divmod(case.budget, len(case.planted))
    return {name: FixedRank(rank + (i < extra)) for i, name in enumerate(case.planted)}


def learned(case: Case, steps: int) -> LearnedRank:
    """The same budget, learned."""
    return LearnedRank(case.budget / len(case.planted), MAX_RANK, total_steps=steps)


def oracle(case: Case, steps: int) -> dict[str, FixedRank]:
    """The planted ranks themselves."""
    return {name: FixedRank(rank) for name, rank in case.planted.items()}


CASES: dict[str, Callable[[int], Case]] = {"dense": dense}
METHODS: dict[str, Callable[[Case, int], Method | Mapping[str, Method]]] = {
    "uniform": uniform,
    "learned": learned,
    "oracle": oracle,
}


def spearman(a: list[int], b: list[int]) -> float:
    """Rank correlation with average ranks for ties; 0 if one of the two is constant."""

    def average_ranks(values: list[int]) -> Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        return (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2

    correlation = torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1]
    return correlation.nan_to_num().item()


def run(case_name: str, seed: int, method: str, steps: int = STEPS) -> Result:
    """Train one arm on fresh data at every step, and test it."""
    case = CASES[case_name](seed)
    model, data = case.student, torch.Generator().manual_seed(seed)
    test = torch.randn(TEST_ROWS, case.features, generator=data)
    without_adapter = error(model, case.teacher, test).item()

    torch.manual_seed(seed)
    adapters = apply_lora(model, METHODS[method](case, steps), targets=list(case.planted))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=LR, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    model.train()
    for _ in range(steps):
        loss = error(model, case.teacher, torch.randn(BATCH, case.features, generator=data))
        loss.backward()
        adapters.step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(loss.item())

    model.eval()
    with torch.no_grad():
        final = error(model, case.teacher, test).item() / without_adapter
    learned_ranks, planted = adapters.ranks(), list(case.planted.values())
    ranks = [int(learned_ranks[name]) for name in case.planted]
    return Result(case_name, seed, method, final, spearman(ranks, planted), case.budget, ranks, planted, history)


def error(model: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """Mean squared distance to the teacher's output."""
    return nn.functional.mse_loss(model(x), teacher(x))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Do learned ranks find the ranks that a task was made with?")
    parser.add_argument("--case", choices=list(CASES), default="dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each arm")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    if args.steps < 50:
        parser.error(f"--steps is {args.steps}; it must be at least 50, to have a freeze with steps before and after")
    try:
        if args.json:
            args.json.open("a").close()
    except OSError as problem:
        parser.error(f"--json: cannot write {args.json}: {problem.strerror}; name another file")
    torch.set_num_threads(1)
    results = []
    print(f"{'seed':>4}  {'method':8}{'loss':>9}{'spearman':>10}{'freeze':>8}{'seconds':>9}  ranks (planted)")
    for seed in args.seeds:
        for method in args.methods:
            start = time.perf_counter()
            results.append(run(args.case, seed, method, args.steps))
            print_row(results[-1], time.perf_counter() - start)
    for method in args.methods:
        losses = [result.loss for result in results if result.method == method]
        print(f"mean  {method:8}{sum(losses) / len(losses):9.4f}")
    if args.json:
        args.json.write_text(json.dumps([result.row() for result in results], indent=1) + "\n")


def print_row(result: Result, seconds: float) -> None:
    """One line of the table; ``freeze`` is the jump of the loss when the ranks became integers."""
    jump = f"{result.freeze_jump():.2f}" if result.method == "learned" else "-"
    ranks = " ".join(f"{rank}({true})" for rank, true in zip(result.ranks, result.planted, strict=True))
    print(
        f"{result.seed:4}  {result.method:8}{result.loss:9.4f}{result.spearman:10.3f}{jump:>8}{seconds:9.1f}  {ranks}",
        flush=True,
    )


if __name__ == "__main__":
    main()
