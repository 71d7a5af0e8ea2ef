"""The cases of the report: every primitive, as the ops call it, for each rank capacity, dtype and layout."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import GPU_SHAPES
from lrlora_ops.kernels import primitives
from lrlora_ops.kernels._tiles import padded_rank

# Square, so that one shape serves every primitive.
SHAPE = next(shape for shape in GPU_SHAPES if (shape.model, shape.projection) == ("8B", "q_proj"))
CAPACITIES = (16, 32, 64, 128)
# tf32 is fp32 after torch.set_float32_matmul_precision("high").
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Of everything but the adapter, and of the adapter.
DTYPE_PAIRS = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("tf32", "tf32"))
# One expert, all of it in order; experts with a component table, gates and gathered rows.
LAYOUTS = ("dense", "grouped")
PRIMITIVES = ("shrink", "expand", "gram", "shrink_gram", "dropout")
_NUM_EXPERTS = 8


@dataclass(frozen=True)
class Case:
    """One call of a launcher. ``adapter`` is the dtype of A and B, ``dtype`` that of everything else."""

    target: str
    primitive: str
    capacity: int
    dtype: str
    adapter: str
    layout: str

    @property
    def dtypes(self) -> str:
        return self.dtype if self.dtype == self.adapter else f"{self.dtype}, {self.adapter} adapter"


def cases(targets: list[str], quick: bool = False) -> list[Case]:
    """Everything that is shipped, or what a test can wait for: bf16 on sm_90 and the widest tiles elsewhere."""
    every = [
        Case(target, primitive, capacity, dtype, adapter, layout)
        for target in targets
        for primitive in PRIMITIVES
        for capacity in CAPACITIES
        for dtype, adapter in DTYPE_PAIRS
        for layout in LAYOUTS
    ]
    return [case for case in every if not _repeats(case) and (not quick or _is_quick(case))]


def _repeats(case: Case) -> bool:
    """dropout knows no rank, adapter, layout or product."""
    first = (CAPACITIES[0], case.dtype, LAYOUTS[0])
    return case.primitive == "dropout" and (case.dtype == "tf32" or (case.capacity, case.adapter, case.layout) != first)


def _is_quick(case: Case) -> bool:
    if case.target == "sm_90" and case.dtype == "bf16":
        return (case.adapter, case.layout) in (("bf16", "dense"), ("fp32", "grouped"))
    return case.capacity == CAPACITIES[-1] and case.layout == "grouped" and case.dtype in ("bf16", "fp32")


def launch(case: Case) -> None:
    """Calls the launcher once on CPU tensors of ``SHAPE``, which nothing reads if the launch itself is intercepted."""
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    dtype, adapter, rank = DTYPES[case.dtype], DTYPES[case.adapter], case.capacity
    grouped = case.layout == "grouped"
    num_experts = _NUM_EXPERTS if grouped else 1
    experts: dict[str, Any] = {}
    gather: dict[str, Any] = {}
    if grouped:
        experts["components"] = torch.arange(num_experts * rank, dtype=torch.int32).view(num_experts, rank)
        experts["group_offsets"] = torch.arange(num_experts + 1, dtype=torch.int32) * (SHAPE.M // num_experts)
        gather["row_index"] = torch.arange(SHAPE.M)
    ranks = torch.full((num_experts,), rank, dtype=torch.int32)
    gate = None if case.layout == "dense" else torch.ones(num_experts * rank)
    x = torch.empty(SHAPE.M, SHAPE.K, dtype=dtype)
    u = torch.empty(SHAPE.M, padded_rank(rank), dtype=dtype)
    a = torch.empty(num_experts * rank, SHAPE.K, dtype=adapter)
    if case.primitive == "shrink":
        primitives.shrink(x, a, ranks, rank, **experts, **gather)
    elif case.primitive == "expand":
        primitives.expand_(x, u, a, ranks, 1.0, gate, **experts)
    elif case.primitive == "gram":
        primitives.gram(u, x, ranks, a.shape[0], 1.0, adapter, gate, **experts, **gather)
    elif case.primitive == "shrink_gram":
        primitives.shrink_gram(x, a, u, ranks, 1.0, gate, **experts)
    else:
        primitives.dropout_add_(torch.empty_like(x), x, torch.zeros((), dtype=torch.int64), 0.1)
