"""LoRA of experts as one would write it in PyTorch: the update as two grouped products beside the base product's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe_providers import ExpertsProblem
from benchmarks.providers import SCALING, Provider, Unavailable


class SplitExperts(nn.Module):
    """Sorted rows, then ``grouped_mm`` for the base, for A and for B, a multiplication and an addition."""

    def __init__(self, problem: ExpertsProblem) -> None:
        super().__init__()
        self.index, self.route = problem.index, problem.route
        self.num_experts = len(problem.ranks)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(weight, requires_grad=False) for name, weight in problem.weights.items()}
        )
        self.lora_A = nn.ParameterDict({name: self._by_expert(a) for name, a in problem.lora_A.items()})
        self.lora_B = nn.ParameterDict({name: self._by_expert(b) for name, b in problem.lora_B.items()})

    def _by_expert(self, pool: Tensor) -> nn.Parameter:
        return nn.Parameter(pool.view(self.num_experts, -1, pool.shape[1]).clone())

    def project(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        """``[L, K] -> [L, N]``."""
        base = F.grouped_mm(rows, self.weights[name].transpose(1, 2), offs=ends)
        u = F.grouped_mm(rows, self.lora_A[name].transpose(1, 2), offs=ends)
        return base + SCALING * F.grouped_mm(u, self.lora_B[name], offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        expert, order = self.index.flatten().sort(stable=True)
        bounds = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(expert, bounds, right=True, out_int32=True)
        top_k = self.index.shape[1]
        left, right = self.project(x[order // top_k], "gate_up_proj", ends).chunk(2, 1)
        rows = self.project(F.silu(left) * right, "down_proj", ends)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return (rows[position].view(*self.index.shape, -1) * self.route[..., None]).sum(1)


def split(problem: ExpertsProblem, compiled: bool = False) -> Provider:
    """``SplitExperts``, under ``torch.compile`` if asked."""
    if len(set(problem.ranks)) > 1:
        raise Unavailable("grouped_mm has one rank for all experts")
    if not hasattr(F, "grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm; it came with 2.10")
    module = SplitExperts(problem)
    leaves: dict[str, Tensor] = {"route": problem.route}
    for name in problem.weights:
        leaves |= {f"{name}.lora_A": module.lora_A[name], f"{name}.lora_B": module.lora_B[name]}
    if compiled:
        torch.compiler.reset()  # what it has compiled for other cases counts towards a limit of recompilations
        module.compile(fullgraph=True, dynamic=False)

    def canonical(name: str, result: Tensor) -> Tensor:
        return result.flatten(0, 1) if "lora" in name else result

    return Provider(problem, module, problem.ranks[0], leaves, canonical)  # type: ignore[arg-type]


BUILDERS = {"split grouped_mm": split, "compile": lambda problem: split(problem, compiled=True)}
