"""The cases of the report: every primitive, as the ops call it, for each rank capacity, dtype and layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import Shape
from benchmarks.static_report.targets import TARGETS

# Square, so that one shape serves every primitive: the q projection of an 8B model.
SHAPE = Shape("8B", "q_proj", 8192, 4096, 4096)
CAPACITIES = (16, 32, 64, 128, 256)  # every BLOCK_R, and two rank tiles of the widest
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Dense with all its rows in order; dense with a gate; experts with a component table, gates and gathered rows.
LAYOUTS = ("dense", "gated", "grouped")
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


def all_cases(targets: list[str]) -> list[Case]:
    """Everything that is shipped."""
    dtypes = [("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")]
    return [
        Case(target, primitive, capacity, dtype, adapter, layout)
        for target in targets
        for primitive in PRIMITIVES
        for capacity in CAPACITIES
        for dtype, adapter in dtypes
        for layout in LAYOUTS
        if not _is_duplicate(primitive, capacity, dtype, adapter, layout)
    ]


def quick_cases(targets: list[str]) -> list[Case]:
    """What a test can wait for: sm_90 in bf16 at every capacity, elsewhere and otherwise the two ends."""

    def is_quick(case: Case) -> bool:
        if case.target == "sm_90" and (case.dtype, case.adapter) == ("bf16", "bf16"):
            return case.layout != "gated"
        return case.capacity in (16, 128) and (
            (case.dtype, case.adapter, case.layout) == ("bf16", "fp32", "grouped")
            or (case.dtype, case.layout, case.target) == ("fp32", "dense", "sm_90")
        )

    return [case for case in all_cases(targets) if is_quick(case)]


def _is_duplicate(primitive: str, capacity: int, dtype: str, adapter: str, layout: str) -> bool:
    """Whether another case compiles to the same code."""
    if primitive == "dropout":
        return (capacity, adapter, layout) != (CAPACITIES[0], dtype, "dense")
    return primitive == "shrink" and layout == "gated"


def launch(case: Case) -> None:
    """Calls the launcher once on CPU tensors of ``SHAPE``, which nothing reads if the launch itself is intercepted."""
    from lrlora_ops.kernels import primitives
    from lrlora_ops.kernels._tiles import padded_rank

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
        primitives.dropout_add_(x, torch.empty_like(x), torch.zeros((), dtype=torch.int64), 0.1)


def cases(targets: list[str] | None = None, quick: bool = False) -> Iterator[Case]:
    """The cases of the named targets (None: all four)."""
    yield from (quick_cases if quick else all_cases)(targets or list(TARGETS))
