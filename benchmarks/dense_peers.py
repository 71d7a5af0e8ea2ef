"""Peers on a dense layer, by their own calling conventions.

LoRAFusion 0.1.0, commit c48d7fdb1b54: ``fused_linear_lora(x [b, s, K], W [N, K], A [r, K], B [N, r], alpha, seed,
dropout_p, bias) -> [b, s, N]``, where alpha is the factor of the update; two-dimensional x fails there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.peers import LORAFUSION
from benchmarks.providers import SCALING, Problem, Provider


class LoRAFusion(nn.Module):
    """A layer on LoRAFusion's op, B stored as it wants it."""

    def __init__(self, ops: Any, problem: Problem, rank: int) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        self.lora_A = nn.Parameter(problem.lora_A[:rank].clone())
        self.lora_B = nn.Parameter(problem.lora_B[:rank].t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.fused_linear_lora(x[None], self.weight, self.lora_A, self.lora_B, SCALING, seed=0, dropout_p=0.0)
        return y[0]


def lorafusion(problem: Problem, rank: int) -> Provider:
    """``LoRAFusion``, if its checkout is there."""
    layer = LoRAFusion(LORAFUSION.load(), problem, rank)
    leaves: dict[str, Tensor] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    return Provider(problem, layer, rank, leaves, lambda name, result: result.t() if name == "lora_B" else result)


BUILDERS = {"LoRAFusion": lorafusion}
