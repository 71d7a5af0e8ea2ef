"""Peers on the experts of an MoE layer, by their own calling conventions.

axolotl 0.18.0, commit 067b021c8b87, ``scattermoe_lora``: ``flatten_sort_count(index [T, k], num_experts) -> (sorted
experts, sorted positions, ends)``; ``parallel_linear_lora(x, W [E, K, N], k, those three, A [E * r, K], B [N, E * r],
scaling, gates=[T, k], grouped_in=, grouped_out=)``, both factors with the expert slowest.

ScatterMoE, commit 47b5e1502e5a: ``parallel_linear`` likewise, without an adapter. Its backward pass, and that of
Liger-Kernel 0.8.2, commit ead96b618e5c, ``LigerFusedMoEFunction.apply(x, W1 [E, 2 I, H], W2 [E, H, I], index int32,
weights)``, always compute the gradients of the expert weights too, which LoRA does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe_providers import ExpertsProblem
from benchmarks.peers import AXOLOTL, LIGER, SCATTERMOE
from benchmarks.providers import SCALING, Provider, Unavailable


class ScatteredExperts(nn.Module):
    """Gated experts on the ops of ScatterMoE or of axolotl's fork of it, with LoRA if the ops have it and ``lora``."""

    def __init__(self, ops: Any, problem: ExpertsProblem, lora: bool) -> None:
        super().__init__()
        self.ops, self.index, self.route = ops, problem.index, problem.route
        self.num_experts = len(problem.ranks)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(weight, requires_grad=False) for name, weight in problem.weights.items()}
        )
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        if lora:
            for name in problem.weights:
                self.lora_A[name] = nn.Parameter(problem.lora_A[name].clone())
                self.lora_B[name] = nn.Parameter(problem.lora_B[name].t().contiguous())

    def project(self, rows: Tensor, name: str, top_k: int, order: tuple[Tensor, ...], **options: Any) -> Tensor:
        weight = self.weights[name].transpose(1, 2)
        if name not in self.lora_A:
            return self.ops.parallel_linear(rows, weight, top_k, *order, **options)
        factors = (self.lora_A[name], self.lora_B[name], SCALING)
        return self.ops.parallel_linear_lora(rows, weight, top_k, *order, *factors, **options)

    def forward(self, x: Tensor) -> Tensor:
        order = self.ops.flatten_sort_count(self.index, num_experts=self.num_experts)
        rows = self.project(x, "gate_up_proj", self.index.shape[1], order, grouped_in=False, grouped_out=True)
        left, right = rows.chunk(2, -1)
        hidden = F.silu(left) * right
        return self.project(hidden, "down_proj", 1, order, grouped_in=True, grouped_out=False, gates=self.route)


def axolotl(problem: ExpertsProblem) -> Provider:
    """axolotl's ``scattermoe_lora``, if its checkout is there."""
    if len(set(problem.ranks)) > 1:
        raise Unavailable("scattermoe_lora has one rank for all experts")
    layer = ScatteredExperts(AXOLOTL.load(), problem, lora=True)
    leaves: dict[str, Tensor] = {"route": problem.route}
    for name in problem.weights:
        leaves |= {f"{name}.lora_A": layer.lora_A[name], f"{name}.lora_B": layer.lora_B[name]}

    def canonical(name: str, result: Tensor) -> Tensor:
        return result.t() if name.endswith("lora_B") else result

    return Provider(problem, layer, problem.ranks[0], leaves, canonical)  # type: ignore[arg-type]


def scattermoe(problem: ExpertsProblem) -> Provider:
    """ScatterMoE's base layer, if its checkout is there."""
    layer = ScatteredExperts(SCATTERMOE.load(), problem, lora=False)
    return Provider(problem, layer, 0, {"route": problem.route})  # type: ignore[arg-type]


class LigerExperts(nn.Module):
    """Gated experts on Liger's fused function."""

    def __init__(self, ops: Any, problem: ExpertsProblem) -> None:
        super().__init__()
        self.ops, self.index, self.route = ops, problem.index.to(torch.int32), problem.route
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(problem.weights[name], requires_grad=False) for name in ("gate_up_proj", "down_proj")
        )

    def forward(self, x: Tensor) -> Tensor:
        apply = self.ops.LigerFusedMoEFunction.apply
        return apply(x, self.gate_up_proj, self.down_proj, self.index, self.route)


def liger(problem: ExpertsProblem) -> Provider:
    """Liger's base layer, if its checkout is there."""
    return Provider(problem, LigerExperts(LIGER.load(), problem), 0, {"route": problem.route})  # type: ignore[arg-type]


BUILDERS: dict[str, Callable[[ExpertsProblem], Provider]] = {
    "axolotl": axolotl,
    "ScatterMoE": scattermoe,
    "Liger": liger,
}
# Who computes more than was asked for, in the backward pass.
TRAIN_THE_WEIGHTS = ("ScatterMoE", "Liger")
