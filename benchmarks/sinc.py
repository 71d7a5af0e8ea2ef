"""A dense layer whose weight a learned function moves (SincUpdate), beside LoRA of its rank and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import providers
from benchmarks.floors import Cost, base_cost, lora_cost, sinc_cost
from benchmarks.providers import FORWARD_BACKWARD, MODES, SCALING, Problem, Provider, compare
from benchmarks.race import DTYPES
from benchmarks.shapes import CPU_SHAPES, LONG_SHAPES, Shape
from lrlora_ops import SincLoRALinear
from lrlora_ops.reference import sinc_lora_linear_reference

NUM_COEFFICIENTS = 9
_ORACLE_ROWS = 1024  # of the weight at a time: autograd in fp64 keeps twenty matrices of them


@dataclass(frozen=True)
class SincProblem(Problem):
    """Coefficients ``[2n + 1]`` in units of the grid; elements of ``B^T A`` are about two grid steps wide."""

    coefficients: Tensor
    grid: float

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, max_rank: int, device: torch.device) -> SincProblem:
        plain = Problem.random(shape, dtype, max_rank, device)
        coefficients = torch.linspace(-1, 1, NUM_COEFFICIENTS, device=device).mul(3).cos()
        shared = {field.name: getattr(plain, field.name) for field in fields(plain)}
        return cls(**shared, coefficients=coefficients, grid=0.5 * shape.K**-0.5)


class Loop(nn.Module):
    """The formula as it is written down, a sinc function at a time, left to autograd."""

    def __init__(self, problem: SincProblem) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        self.lora_A, self.lora_B = (nn.Parameter(t.clone()) for t in (problem.lora_A, problem.lora_B))
        self.coefficients, self.grid = nn.Parameter(problem.coefficients.clone()), problem.grid

    def forward(self, x: Tensor) -> Tensor:
        z = self.lora_B.float().t() @ self.lora_A.float()
        return F.linear(x, (self.weight + SCALING * self.phi(z)).to(x.dtype))

    def phi(self, z: Tensor) -> Tensor:
        w, total, reach = z / self.grid, z, len(self.coefficients) // 2
        for k, c in zip(range(-reach, reach + 1), self.coefficients * self.grid, strict=True):
            total = total + c * (torch.sinc(w - k) - float(k == 0))
        return total


class Stacked(Loop):
    """The same with all sinc functions in one tensor, summed by a product: more memory, slower, and less exact."""

    def phi(self, z: Tensor) -> Tensor:
        reach = len(self.coefficients) // 2
        centres = torch.arange(-reach, reach + 1, dtype=z.dtype, device=z.device)
        c = self.coefficients * self.grid
        return z + torch.sinc(z[..., None] / self.grid - centres) @ c - c[reach]


def plain(kind: type[Loop]) -> Callable[[SincProblem, int], Provider]:
    """A builder of one of the modules above."""
    return lambda problem, rank: _provider(problem, kind(problem), rank)


def lrlora(problem: SincProblem, rank: int) -> Provider:
    """This library's module."""
    out_features, in_features = problem.weight.shape
    base = nn.Linear(in_features, out_features, bias=False, device="meta")
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    layer = SincLoRALinear.from_linear(
        base, rank=rank, num_coefficients=NUM_COEFFICIENTS, grid=problem.grid, lora_alpha=SCALING * rank,
        dtype=problem.lora_A.dtype,
    )  # fmt: skip
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "coefficients"):
            getattr(layer, name).copy_(getattr(problem, name))
    return _provider(problem, layer, rank)


def _provider(problem: SincProblem, layer: nn.Module, rank: int) -> Provider:
    leaves = {name: getattr(layer, name) for name in ("lora_A", "lora_B", "coefficients")}
    return Provider(problem, layer, rank, leaves)


BUILDERS: dict[str, Callable[[SincProblem, int], Provider]] = {
    "base": providers.base,
    "lrlora": lrlora,
    "lrlora LoRA": providers.lrlora,
    "loop": plain(Loop),
    "stacked": plain(Stacked),
}


class Oracle(providers.Oracle):
    """What LoRA must compute, and what the learned function must, in fp64."""

    def __init__(self, problem: SincProblem) -> None:
        super().__init__(problem)
        self.sinc = problem

    def moved(self) -> dict[str, Tensor]:
        """The output and all gradients of the learned function."""
        p = self.sinc
        parts: list[tuple[Tensor, ...]] = []
        for rows in torch.arange(p.weight.shape[0], device=p.x.device).split(_ORACLE_ROWS):
            given = (p.x, p.lora_A, p.lora_B[:, rows], p.coefficients)
            leaves = [t.detach().double().requires_grad_() for t in given]
            x, lora_A, lora_B, c = leaves
            y = sinc_lora_linear_reference(x, p.weight[rows], lora_A, lora_B, c * p.grid, grid=p.grid, scaling=SCALING)
            parts.append((y.detach(), *torch.autograd.grad(y, leaves, p.dy[:, rows].double())))
        y, d_x, d_a, d_b, d_c = zip(*parts, strict=True)
        summed = {"x": reduce(add, d_x), "lora_A": reduce(add, d_a), "coefficients": reduce(add, d_c)}
        return {"y": torch.cat(y, 1), "lora_B": torch.cat(d_b, 1), **summed}

    def check(self, provider: Provider) -> None:
        """Compare a provider's output and gradients; raises as ``compare`` does."""
        if "coefficients" in provider.leaves:
            compare(self.moved(), provider.results())
        else:
            super().check(provider)


@dataclass(frozen=True)
class Case:
    """One layer and dtype, with updates of one rank. The lowest ``priority`` comes first."""

    shape: Shape
    dtype: torch.dtype
    max_rank: int = 16
    effort: float = 1.0
    modes: tuple[str, ...] = MODES
    priority: int = 3

    def __str__(self) -> str:
        return f"{self.layer} {DTYPES[self.dtype]} r{self.max_rank}"

    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""
        return str(self).replace(" ", "-")

    @property
    def layer(self) -> str:
        return f"sinc {self.shape}"

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, rank)."""
        names = {"lrlora": "lrlora", "LoRA": "lrlora LoRA", "autograd, loop": "loop"}
        return {"base": ("base", 0), **{name: (builder, self.max_rank) for name, builder in names.items()}}

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """The providers of one random problem, and its oracle."""
        problem = SincProblem.random(self.shape, self.dtype, self.max_rank, device)
        return lambda builder, rank: BUILDERS[builder](problem, rank), Oracle(problem).check

    def work(self, provider: Provider, mode: str) -> Cost:
        """What has to be done: the base layer's work, or what LoRA or the learned function adds to it."""
        size, backward = self.dtype.itemsize, mode == FORWARD_BACKWARD
        if provider.rank == 0:
            return base_cost(self.shape, size, backward=backward)
        if "coefficients" in provider.leaves:
            return sinc_cost(self.shape, provider.rank, size, backward=backward)
        return lora_cost(self.shape, provider.rank, size, size, backward=backward)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """All cases for a device, or a tiny one that shows that the suite runs."""
    if quick:
        return [Case(Shape("tiny", "q_proj", 64, 96, 80), torch.float32, 8, effort=0.05)]
    if device.type == "cuda":
        return [Case(shape, torch.bfloat16) for shape in LONG_SHAPES[:3]]
    few = replace(CPU_SHAPES[0], M=CPU_SHAPES[0].M // 4)  # rows, so that products hide less of the function
    return [Case(shape, torch.float32) for shape in (few, *CPU_SHAPES)]
