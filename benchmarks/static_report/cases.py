"""The cases of the report: every primitive, as the ops call it, for each rank capacity, dtype and layout."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import GPU_SHAPES
from lrlora_ops.kernels import primitives
from lrlora_ops.kernels._tiles import padded_rank

# Square, so that one shape serves every primitive.
SHAPE = next(shape for shape in GPU_SHAPES if (shape.model, shape.projection) == ("8B", "q_proj"))
CAPACITIES = (16, 32, 64, 128)
# tf32 is fp32 after torch.set_float32_matmul_precision("high").
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
# One expert, all of it in order, onto whose output the base product is added; experts with a component table, gates,
# biases and gathered rows; experts so many that a tile must suit few rows each; no rows, but a weight, or experts'.
LAYOUTS = {"dense": 1, "grouped": 8, "few rows": 256, "weight": 1, "weights": 8}
# (dtype of everything but the adapter, of the adapter, layout): each table of tiles with every flag of the kernels off
# or on, not every combination. fp16 is compiled as bf16 is.
VARIANTS = (
    ("bf16", "bf16", "dense"),
    ("bf16", "fp32", "grouped"),
    ("fp32", "fp32", "grouped"),
    ("tf32", "tf32", "grouped"),
)
PRIMITIVES = {name: VARIANTS for name in ("shrink", "expand", "gram", "shrink_gram")}
# These know experts alone.
_OF_EXPERTS = ("grouped_gemm", "gated_shrink", "gated_shrink_backward", "adapter_gradients")
PRIMITIVES |= {name: (("bf16", "bf16", "few rows"), *VARIANTS[1:]) for name in _OF_EXPERTS}
# A weight, moved, and the gradients of what moves it: of one layer, and of experts.
_OF_WEIGHTS = ("sinc_weight", "sinc_gradients")
_LAYOUTS_OF_WEIGHTS = {"dense": "weight", "grouped": "weights"}
_WEIGHTS = tuple((dtype, adapter, _LAYOUTS_OF_WEIGHTS[layout]) for dtype, adapter, layout in VARIANTS)
PRIMITIVES |= {name: _WEIGHTS for name in _OF_WEIGHTS}
NUM_COEFFICIENTS = 9
# Those that know no rank, with the variants in which their code differs.
RANKLESS = {
    "combine": (("bf16", "bf16", "grouped"), ("fp32", "fp32", "grouped")),
    "route": (("bf16", "bf16", "grouped"), ("bf16", "bf16", "few rows")),
    "dropout": (("bf16", "bf16", "dense"), ("fp32", "fp32", "dense")),
}
_TOP_K = 8


@dataclass(frozen=True)
class Case:
    """One call of a launcher. ``adapter`` is the dtype of A and B, ``dtype`` that of everything else; 0 is no rank."""

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
    """Everything that is shipped, or what a test can wait for: bf16's widest tiles, and on sm_90 more of them."""
    kinds = [(primitive, capacity, variants) for primitive, variants in PRIMITIVES.items() for capacity in CAPACITIES]
    kinds += [(primitive, 0, variants) for primitive, variants in RANKLESS.items()]
    every = [
        Case(target, primitive, capacity, *variant)
        for target in targets
        for primitive, capacity, variants in kinds
        for variant in variants
    ]
    return [case for case in every if not quick or _is_quick(case)]


def _is_quick(case: Case) -> bool:
    """bf16's widest tiles; on sm_90 its narrowest too, and the widest of fp32."""
    is_widest = case.capacity in (0, CAPACITIES[-1]) and case.layout in ("grouped", "weights")
    if case.dtype == "bf16":
        return is_widest or (case.target == "sm_90" and case.capacity in (0, CAPACITIES[0]))
    return is_widest and case.dtype == "fp32" and case.target == "sm_90"


def launch(case: Case) -> None:
    """Calls the launcher once on CPU tensors of ``SHAPE``, which nothing reads if the launch itself is intercepted."""
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    if case.primitive in RANKLESS:
        _launch_rankless(case)
        return
    dtype, adapter, rank = DTYPES[case.dtype], DTYPES[case.adapter], case.capacity
    num_experts, gather = LAYOUTS[case.layout], _routing(case)
    experts: dict[str, Any] = {}
    if "group_offsets" in gather:
        experts["components"] = torch.arange(num_experts * rank, dtype=torch.int32).view(num_experts, rank)
        experts["group_offsets"] = gather.pop("group_offsets")
    ranks = torch.full((num_experts,), rank, dtype=torch.int32)
    gate = torch.ones(num_experts * rank) if experts else None
    x = torch.empty(SHAPE.M, SHAPE.K, dtype=dtype)
    u = torch.empty(SHAPE.M, padded_rank(rank), dtype=dtype)
    a = torch.empty(num_experts * rank, SHAPE.K, dtype=adapter)
    if case.primitive == "shrink":
        primitives.shrink(x, a, ranks, rank, **experts, **gather)
    elif case.primitive == "expand":
        primitives.expand(u, a, ranks, 1.0, gate, **experts, base=x if experts else None)
    elif case.primitive == "grouped_gemm":
        low_rank = {"u": u, "b": a, "ranks": ranks, "gate": gate, "components": experts.pop("components")}
        weight = x.new_empty(1, SHAPE.N, SHAPE.K).expand(num_experts, -1, -1)
        bias = x.new_empty(num_experts, SHAPE.N)
        primitives.grouped_gemm(x, weight, bias, case.layout == "grouped", **experts, **gather, **low_rank)
    elif case.primitive in _OF_WEIGHTS:
        _launch_of_weights(case, a, experts.get("group_offsets"))
    elif case.primitive in _OF_EXPERTS:
        _launch_of_experts(case.primitive, x, u, a, (ranks, 1.0, gate), experts, gather["row_index"])
    elif case.primitive == "gram":
        primitives.gram(u, x, ranks, a.shape[0], 1.0, adapter, gate, **experts, **gather)
    else:
        primitives.shrink_gram(x, a, u, ranks, 1.0, gate, **experts, **gather)


def _launch_of_experts(
    primitive: str,
    x: Tensor,
    u: Tensor,
    a: Tensor,
    low_rank: tuple[Tensor, float, Tensor | None],
    experts: dict[str, Tensor],
    row_index: Tensor,
) -> None:
    """x is ``[gate, up]``, or what is multiplied; every option that the op uses is on."""
    weights, ranks = torch.ones(SHAPE.M // _TOP_K, _TOP_K), low_rank[0]
    if primitive == "gated_shrink":
        primitives.gated_shrink(x, a[:, : SHAPE.K // 2].contiguous(), "silu", ranks, **experts)
    elif primitive == "gated_shrink_backward":
        dh = x.new_empty(SHAPE.M, SHAPE.K // 2)
        primitives.gated_shrink_backward(dh, x, a, weights, row_index, "silu", ranks, **experts)
    else:
        statistics = torch.empty(a.shape[0]), torch.empty(2, len(ranks))
        outputs = (torch.empty_like(a), torch.empty_like(a), *statistics, torch.zeros(1024, dtype=torch.int32))
        indices = (None, row_index, weights, row_index, weights)
        primitives.adapter_gradients(*outputs, u, u, x, x, *low_rank, *experts.values(), *indices)


def _launch_of_weights(case: Case, a: Tensor, group_offsets: Tensor | None) -> None:
    dtype = DTYPES[case.dtype]
    shape = (SHAPE.M, SHAPE.K) if group_offsets is None else (LAYOUTS[case.layout], SHAPE.M, SHAPE.K)
    weight, b, c = torch.empty(shape, dtype=dtype), a.new_empty(a.shape[0], SHAPE.M), torch.ones(NUM_COEFFICIENTS)
    if case.primitive == "sinc_weight":
        primitives.sinc_weight(weight, a, b, c, 0.1, 1.0, dtype, group_offsets)
    else:
        primitives.sinc_gradients(weight, weight, a, b, c, 0.1, 1.0, group_offsets)


def _routing(case: Case) -> dict[str, Tensor]:
    """Where each expert's rows end, and which rows they are."""
    num_experts = LAYOUTS[case.layout]
    if num_experts == 1:
        return {}
    return {
        "group_offsets": torch.arange(num_experts + 1, dtype=torch.int32) * (SHAPE.M // num_experts),
        "row_index": torch.arange(SHAPE.M),
    }


def _launch_rankless(case: Case) -> None:
    if case.primitive == "route":
        primitives.route(torch.zeros(SHAPE.M // _TOP_K, _TOP_K, dtype=torch.int64), LAYOUTS[case.layout])
        return
    x = torch.empty(SHAPE.M, SHAPE.K, dtype=DTYPES[case.dtype])
    if case.primitive == "combine":
        positions = torch.arange(SHAPE.M).view(-1, _TOP_K)
        primitives.combine(x, positions, torch.ones(positions.shape), torch.zeros(9, dtype=torch.int32))
    else:
        primitives.dropout(x, torch.zeros((), dtype=torch.int64), 0.1)
