"""The planted tasks: which network, moved by what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.planted.networks import MAX_RANK, Block, MixtureOfExperts

FEATURES, VOCABULARY = 64, 4096
DENSE_ROWS = 128  # of a training batch
MOE_ROWS = 512  # the least popular of 16 experts gets 9 of them


@dataclass(frozen=True)
class Case:
    """One task: reach the teacher from the student, which differ by updates of the planted ranks.

    Attributes:
        student: What gets the adapters, or has them: the blocks of experts.
        teacher: Its copy with the updates in the weights.
        planted: Name of a layer -> its rank, or the ranks of its experts, in the order of the network.
        rows: Of a training batch.
        vocabulary: Tokens that choose experts; 0 for a dense network.
    """

    student: nn.Module
    teacher: nn.Module
    planted: dict[str, list[int]]
    rows: int
    vocabulary: int = 0

    @property
    def groups(self) -> int:
        return sum(len(ranks) for ranks in self.planted.values())

    @property
    def budget(self) -> int:
        return sum(sum(ranks) for ranks in self.planted.values())

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Fresh inputs of the networks: Gaussian rows and, for experts, the tokens that choose them."""
        x = torch.randn(rows, FEATURES, generator=generator)
        return (x, torch.randint(self.vocabulary, (rows,), generator=generator)) if self.vocabulary else (x,)


def low_rank(rank: int) -> Tensor:
    """A product of two Gaussian matrices; zero for rank 0."""
    return torch.randn(FEATURES, rank) @ torch.randn(rank, FEATURES)


def elementwise(rank: int) -> Tensor:
    """A sine of each element of such a product: of full rank."""
    product = low_rank(rank)
    return torch.sin(1.5 * product / product.std())


def power_law(exponent: float) -> Tensor:
    """Random singular vectors, and ``i^-exponent`` as the i-th singular value."""
    left, right = (torch.linalg.qr(torch.randn(FEATURES, FEATURES)).Q for _ in range(2))
    return left @ torch.diag(_spectrum([exponent])[0].sqrt().float()) @ right


def move(weight: Tensor, update: Tensor) -> None:
    """Add the update, scaled to a quarter of the Frobenius norm of a weight."""
    weight.add_(update * (FEATURES**0.5 / 4) / update.norm().clamp(min=torch.finfo(update.dtype).tiny))


def dense(seed: int, ranks: Sequence[int] = (0, 1, 2, 4, 8, 16) * 2) -> Case:
    """Residual blocks of two layers of 64 x 64 each; updates of these ranks in random order."""
    student, teacher, planted = _dense(seed, ranks, low_rank)
    return Case(student, teacher, planted, DENSE_ROWS)


def dense_power_law(
    seed: int, exponents: Sequence[float] = (0.5, 0.8, 1.1, 1.4, 1.7, 2.0) * 2, budget: int = 62
) -> Case:
    """The same network with updates of full rank; planted is where truncating them loses least in all."""
    student, teacher, chosen = _dense(seed, exponents, power_law)
    return Case(student, teacher, _truncate(chosen, torch.ones(len(exponents)), budget), DENSE_ROWS)


def dense_elementwise(seed: int, ranks: Sequence[int] = (4,) * 12) -> Case:
    """The same network with updates of full rank, that a function of each element makes of products of these ranks."""
    student, teacher, planted = _dense(seed, ranks, elementwise)
    return Case(student, teacher, planted, DENSE_ROWS)


def moe(seed: int, ranks: Sequence[int] = (0, 1, 2, 4, 8, 16) * 2 + (1, 2, 4, 8)) -> Case:
    """Two layers of experts; in each, updates of these ranks in random order, so that load says nothing about them."""
    student, teacher, planted = _moe(seed, ranks, low_rank)
    return Case(student, teacher, planted, MOE_ROWS, VOCABULARY)


def moe_power_law(
    seed: int, exponents: Sequence[float] = tuple(0.5 + 0.1 * i for i in range(16)), budget: int = 154
) -> Case:
    """The same layers with updates of full rank; planted is where truncating them loses least, by load, in all."""
    student, teacher, chosen = _moe(seed, exponents, power_law)
    importance = torch.cat([layer.importance() for layer in student.layers])
    return Case(student, teacher, _truncate(chosen, importance, budget), MOE_ROWS, VOCABULARY)


CASES: dict[str, Callable[[int], Case]] = {
    "dense": dense,
    "dense-equal": partial(dense, ranks=(4,) * 12),
    "dense-elementwise": dense_elementwise,
    "dense-powerlaw": dense_power_law,
    "moe": moe,
    "moe-powerlaw": moe_power_law,
}


def _dense(seed: int, kinds: Sequence, update: Callable[..., Tensor]) -> tuple[nn.Sequential, nn.Sequential, dict]:
    torch.manual_seed(seed)
    student = nn.Sequential(*(Block(FEATURES) for _ in range(len(kinds) // 2)))
    teacher = copy.deepcopy(student)
    layers = {name: layer for name, layer in teacher.named_modules() if isinstance(layer, nn.Linear)}
    chosen = dict(zip(layers, ([kind] for kind in _shuffled(kinds)), strict=True))
    for name, (kind,) in chosen.items():
        move(layers[name].weight, update(kind))
    return student, teacher, chosen


def _moe(seed: int, kinds: Sequence, update: Callable[..., Tensor]) -> tuple[MixtureOfExperts, nn.Module, dict]:
    torch.manual_seed(seed)
    student = MixtureOfExperts(2, FEATURES, len(kinds), VOCABULARY)
    teacher = copy.deepcopy(student).eval()
    chosen = {f"layers.{i}.up": _shuffled(kinds) for i in range(len(teacher.layers))}
    for layer, of_experts in zip(teacher.layers, chosen.values(), strict=True):
        for expert, kind in enumerate(of_experts):
            move(layer.up.weight[expert], update(kind))
            move(layer.down.weight[expert], update(kind))
    return student, teacher, chosen


def _shuffled(kinds: Sequence) -> list:
    return [kinds[i] for i in torch.randperm(len(kinds)).tolist()]


def _spectrum(exponents: Sequence[float]) -> Tensor:
    """fp64 ``[G, 64]``: the squared singular values."""
    return torch.arange(1, FEATURES + 1, dtype=torch.float64) ** (-2 * torch.tensor(exponents).double()[:, None])


def _truncate(chosen: dict[str, list[float]], importance: Tensor, budget: int) -> dict[str, list[int]]:
    """The ranks within the budget that keep most of all spectra, each of sum one times its group's importance."""
    energy = _spectrum([exponent for exponents in chosen.values() for exponent in exponents])
    energy *= importance[:, None] / energy.sum(1, keepdim=True)
    kept = energy[:, :MAX_RANK].flatten().topk(budget).indices // MAX_RANK
    ranks = iter(torch.bincount(kept, minlength=len(energy)).tolist())
    return {name: [next(ranks) for _ in exponents] for name, exponents in chosen.items()}
