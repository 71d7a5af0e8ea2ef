"""The launches of whole layers, without a GPU or memory: the ops run on meta tensors, and no kernel runs.

The ops and the launchers decide arguments and grids, so what is counted here cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.floors import Cost, launch_cost
from benchmarks.shapes import ExpertsShape, ProjectionShape, Shape
from lrlora_ops import ExpertLinear, RankTable, grouped_lora_linear, lora_linear, moe_lora_mlp, sinc_lora_linear
from lrlora_ops.ops import _backends

# Every launch of a Triton kernel passes through their ``run``.
KERNEL_CLASSES = (JITFunction, InterpretedFunction)


@dataclass(frozen=True)
class Launched:
    """One launch that did not happen."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def cost(self) -> Cost:
        return launch_cost(self.kernel, self.arguments)


@contextmanager
def recorded_launches() -> Iterator[list[Launched]]:
    """What would have been launched within, on meta tensors, in order."""
    launched: list[Launched] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = {name: named[name] for name in kernel.arg_names}
        launched.append(Launched(kernel.__name__, tuple(grid), arguments))

    patches = [mock.patch.object(kind, "run", record) for kind in KERNEL_CLASSES]
    patches.append(mock.patch.object(_backends, "_require_triton", lambda device: None))
    # Tensors without values are traced elsewhere, by the fakes of the launchers.
    patches.append(mock.patch.dict(_backends._PRIMITIVES, triton=_backends._FUNCTIONS["triton"]))
    for patch in patches:
        patch.start()
    try:
        yield launched
    finally:
        for patch in patches:
            patch.stop()


def layer_launches(
    layer: ExpertsShape, rank: int, dtype: torch.dtype = torch.bfloat16, adapter: torch.dtype = torch.bfloat16
) -> tuple[list[Launched], list[Launched]]:
    """Of forward and of backward of a layer of SiLU experts, all of one rank, with every gradient and the demand."""
    with torch.device("meta"):
        table = RankTable(layer.num_experts, rank, layer.num_experts * rank)
        x = torch.empty(layer.T, layer.hidden, dtype=dtype, requires_grad=True)
        index = torch.empty(layer.T, layer.top_k, dtype=torch.int64)
        weights = torch.empty(layer.T, layer.top_k, dtype=dtype, requires_grad=True)
        up, down = (
            _projection(layer.num_experts, table.pool_size, features, dtype, adapter)
            for features in ((layer.hidden, 2 * layer.intermediate), (layer.intermediate, layer.hidden))
        )
    inputs = [x, weights, up.lora_A, up.lora_B, up.gate, down.lora_A, down.lora_B, down.gate, table.demand]
    with recorded_launches() as forward:
        y = moe_lora_mlp(x, index, weights, up, down, table, activation="silu", demand=table.demand, backend="triton")
    with recorded_launches() as backward:
        torch.autograd.grad(y, inputs, torch.empty_like(y))
    return forward, backward


def linear_launches(shape: Shape | ProjectionShape, rank: int) -> tuple[list[Launched], list[Launched]]:
    """Of forward and of backward of one linear layer, or of one projection of experts of one rank; all in bf16."""
    experts = shape.num_experts if isinstance(shape, ProjectionShape) else 1
    rows = shape.rows if isinstance(shape, ProjectionShape) else shape.M
    with torch.device("meta"):
        linear = _projection(experts, experts * rank, (shape.K, shape.N), torch.bfloat16, torch.bfloat16)
        x = torch.empty(rows, shape.K, dtype=torch.bfloat16, requires_grad=True)
        table, offsets = RankTable(experts, rank, experts * rank), torch.empty(experts + 1, dtype=torch.int32)
    options: dict[str, Any] = {"gate": linear.gate, "backend": "triton"}
    with recorded_launches() as forward:
        if isinstance(shape, ProjectionShape):
            adapter = (linear.lora_A, linear.lora_B, offsets, table)
            y = grouped_lora_linear(x, *adapter, weight=linear.weight, **options)
        else:
            y = lora_linear(x, linear.lora_A, linear.lora_B, weight=linear.weight[0], **options)
    with recorded_launches() as backward:
        torch.autograd.grad(y, [x, linear.lora_A, linear.lora_B, linear.gate], torch.empty_like(y))
    return forward, backward


def sinc_launches(
    shape: Shape, rank: int, num_coefficients: int = 9, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Launched], list[Launched]]:
    """Of forward and of backward of a layer that a learned function moves, with every gradient; products apart."""
    with torch.device("meta"):
        x = torch.empty(shape.M, shape.K, dtype=dtype, requires_grad=True)
        weight = torch.empty(shape.N, shape.K, dtype=dtype)
        lora_A, lora_B = (torch.empty(rank, size, dtype=dtype, requires_grad=True) for size in (shape.K, shape.N))
        coefficients = torch.empty(num_coefficients, requires_grad=True)
    leaves = [x, lora_A, lora_B, coefficients]
    with recorded_launches() as forward:
        y = sinc_lora_linear(x, weight, lora_A, lora_B, coefficients, grid=0.1, scaling=1.0, backend="triton")
    with recorded_launches() as backward:
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    return forward, backward


def _projection(
    num_experts: int, pool_size: int, features: tuple[int, int], dtype: torch.dtype, adapter: torch.dtype
) -> ExpertLinear:
    in_features, out_features = features
    return ExpertLinear(
        weight=torch.empty(num_experts, out_features, in_features, dtype=dtype),
        lora_A=torch.empty(pool_size, in_features, dtype=adapter, requires_grad=True),
        lora_B=torch.empty(pool_size, out_features, dtype=adapter, requires_grad=True),
        gate=torch.empty(pool_size, requires_grad=True),
    )
