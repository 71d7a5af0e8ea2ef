"""One projection of all experts, rows sorted: the case of PEFT's pull request 3577, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.floors import Cost, base_cost, lora_cost
from benchmarks.providers import FORWARD_BACKWARD, MODES, SCALING, Provider, Unavailable, compare
from benchmarks.race import DTYPES
from benchmarks.shapes import ProjectionShape
from lrlora_ops import RankTable, grouped_lora_linear


@dataclass(frozen=True)
class ProjectionProblem:
    """x ``[L, K]`` requires a gradient; dy ``[L, N]``, weight ``[E, N, K]``; lora_A and lora_B are ``[E, r, ...]``."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    offsets: list[int]

    @classmethod
    def random(cls, shape: ProjectionShape, dtype: torch.dtype, rank: int, device: torch.device) -> ProjectionProblem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).mul_(scale).to(dtype)

        owners = torch.randint(shape.num_experts, (shape.rows,), generator=generator, device=device)
        sizes = owners.bincount(minlength=shape.num_experts).tolist()
        return cls(
            x=normal(shape.rows, shape.K).requires_grad_(),
            dy=normal(shape.rows, shape.N),
            weight=normal(shape.num_experts, shape.N, shape.K, scale=shape.K**-0.5),
            lora_A=normal(shape.num_experts, rank, shape.K, scale=shape.K**-0.5),
            lora_B=normal(shape.num_experts, rank, shape.N, scale=rank**-0.5),
            offsets=[0, *accumulate(sizes)],
        )


class Stack(nn.Module):
    """The frozen projections alone, by ``grouped_mm``."""

    def __init__(self, problem: ProjectionProblem) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        device = problem.x.device
        self.register_buffer("ends", torch.tensor(problem.offsets[1:], dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=self.ends)


class Split(Stack):
    """The update as two more grouped products, a multiplication and an addition."""

    def __init__(self, problem: ProjectionProblem) -> None:
        super().__init__(problem)
        self.lora_A, self.lora_B = (nn.Parameter(pool.clone()) for pool in (problem.lora_A, problem.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        u = F.grouped_mm(x, self.lora_A.transpose(1, 2), offs=self.ends)
        return super().forward(x) + SCALING * F.grouped_mm(u, self.lora_B, offs=self.ends)


class Ranked(Stack):
    """This library's op."""

    def __init__(self, problem: ProjectionProblem) -> None:
        super().__init__(problem)
        experts, rank = problem.lora_A.shape[:2]
        self.lora_A, self.lora_B = (
            nn.Parameter(pool.float().flatten(0, 1)) for pool in (problem.lora_A, problem.lora_B)
        )
        self.table = RankTable.uniform(experts, rank).to(problem.x.device)
        self.register_buffer("offsets", F.pad(self.ends, (1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        return grouped_lora_linear(
            *(x, self.lora_A, self.lora_B, self.offsets, self.table), scaling=SCALING, weight=self.weight
        )


def base(problem: ProjectionProblem) -> Provider:
    """``Stack`` as it is."""
    return Provider(problem, Stack(problem), 0)  # type: ignore[arg-type]


def adapted(problem: ProjectionProblem, kind: type[Split] | type[Ranked]) -> Provider:
    """One of the modules with both factors as parameters."""
    module = kind(problem)
    leaves = {"lora_A": module.lora_A, "lora_B": module.lora_B}
    return Provider(  # type: ignore[arg-type]
        *(problem, module, problem.lora_A.shape[1], leaves),
        lambda name, result: result.view(problem.lora_A.shape[0], -1, result.shape[-1]) if "lora" in name else result,
    )


def peft(problem: ProjectionProblem) -> Provider:
    """PEFT's LoRA of a parameter, which adapts the whole stack of weights in each forward pass."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"PEFT cannot be imported ({error}); pip install peft") from error
    experts, rank = problem.lora_A.shape[:2]
    model = nn.ModuleDict({"layer": Stack(problem)})
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_parameters=["layer.weight"])
    inject_adapter_in_model(config, model)
    layer: Any = model["layer"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        lora_a.copy_(problem.lora_A.flatten(0, 1))
        lora_b.copy_(problem.lora_B.permute(2, 1, 0).reshape(lora_b.shape))

    def canonical(name: str, result: Tensor) -> Tensor:
        if name == "lora_B":
            return result.view(-1, rank, experts).permute(2, 1, 0)
        return result.view(experts, rank, -1) if name == "lora_A" else result

    return Provider(problem, layer, rank, {"lora_A": lora_a, "lora_B": lora_b}, canonical)  # type: ignore[arg-type]


BUILDERS: dict[str, Callable[[ProjectionProblem], Provider]] = {
    "base": base,
    "lrlora": lambda problem: adapted(problem, Ranked),
    "split grouped_mm": lambda problem: adapted(problem, Split),
    "PEFT": peft,
}


class Oracle:
    """What a provider must compute, in fp64, expert by expert."""

    def __init__(self, problem: ProjectionProblem) -> None:
        self.expected = {True: self._results(problem, SCALING), False: self._results(problem, 0.0)}

    @staticmethod
    def _results(p: ProjectionProblem, scaling: float) -> dict[str, Tensor]:
        x, a, b = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
        rows = [
            x[first:end] @ p.weight[e].double().t() + scaling * (x[first:end] @ a[e].t()) @ b[e]
            for e, (first, end) in enumerate(pairwise(p.offsets))
        ]
        y = torch.cat(rows)
        d_x, d_a, d_b = torch.autograd.grad(y, (x, a, b), p.dy.double())
        return {"y": y.detach(), "x": d_x, "lora_A": d_a, "lora_B": d_b}

    def check(self, provider: Provider) -> None:
        """Compare a provider's output and gradients; raises as ``compare`` does."""
        results, expected = provider.results(), self.expected[provider.rank > 0]
        compare({name: expected[name] for name in results}, results)


@dataclass(frozen=True)
class Case:
    """One projection, dtype and rank, see ``race.Case``."""

    shape: ProjectionShape
    dtype: torch.dtype
    rank: int
    peers: tuple[str, ...]
    effort: float = 1.0
    modes: tuple[str, ...] = MODES
    priority: int = 0

    def __str__(self) -> str:
        return f"{self.shape} {DTYPES[self.dtype]} r{self.rank}"

    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""
        return str(self).replace(" ", "-")

    @property
    def layer(self) -> str:
        return str(self.shape)

    @property
    def max_rank(self) -> int:
        return self.rank

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, rank)."""
        return {name: (name, 0 if name == "base" else self.rank) for name in ("base", "lrlora", *self.peers)}

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """The providers of one random problem, and its oracle."""
        problem = ProjectionProblem.random(self.shape, self.dtype, self.rank, device)
        return lambda builder, _: BUILDERS[builder](problem), Oracle(problem).check

    def work(self, provider: Provider, mode: str) -> Cost:
        """What has to be done: the base layer's work, or the work of the components alone."""
        size, backward = self.dtype.itemsize, mode == FORWARD_BACKWARD
        if provider.rank == 0:
            return base_cost(self.shape, size, backward=backward)
        return lora_cost(self.shape, provider.rank, size, size, backward=backward)


PEERS = ("PEFT", "split grouped_mm")
PEFT_CASE = Case(ProjectionShape(4096, 128, 2048, 768), torch.bfloat16, 16, PEERS)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """PEFT's case where there is a GPU, or a tiny one that shows that the suite runs."""
    if quick:
        return [Case(ProjectionShape(40, 4, 24, 16), torch.float32, 8, PEERS, 0.05, (FORWARD_BACKWARD,))]
    return [PEFT_CASE] if device.type == "cuda" else []
