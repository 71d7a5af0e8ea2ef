"""The primitives of both backends against the fp64 oracle, in every dtype that the machine can check.

The Triton launchers run interpreted where there is no GPU. Interpreted bf16 is garbage (triton-lang/triton#11584);
``test_primitives_gpu.py`` covers it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lrlora_ops import eager
from tests._oracle import (
    SCALING,
    Case,
    Inputs,
    assert_parity,
    expected_expand,
    expected_gram,
    expected_shrink,
    expected_shrink_gram,
    make_inputs,
)

triton_ops = importlib.import_module("lrlora_ops.kernels.primitives")
triton_shrink_gram = importlib.import_module("lrlora_ops.kernels.shrink_gram")
padded_rank = importlib.import_module("lrlora_ops.kernels._tiles").padded_rank

pytestmark = pytest.mark.usefixtures("poison")

EAGER = [("eager", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
TRITON = [("triton", dtype) for dtype in (torch.float32, torch.float16)]
CASES = {
    "no rows": Case((3,), 4, rows=0, in_features=40, out_features=24),
    "all ones": Case((1,), 1, rows=1, in_features=1, out_features=1),  # Triton specialises on 1
    "no tile divides": Case((12,), 12, rows=65, in_features=150, out_features=139),
    "full tiles": Case((16,), 16, rows=64, in_features=128, out_features=128),
    "no columns in": Case((3,), 3, rows=3, in_features=0, out_features=5),
    "no columns out": Case((3,), 3, rows=3, in_features=5, out_features=0),
    "rank 0": Case((0,), 8, rows=5, in_features=33, out_features=17),
    "empty pool": Case((0,), 0, rows=5, in_features=33, out_features=17),
    "far below capacity": Case((5,), 64, rows=7, in_features=20, out_features=30),
    "second rank tile half live": Case((200,), 256, rows=20, in_features=48, out_features=40),
    "second rank tile dead": Case((100,), 256, rows=20, in_features=48, out_features=40),
    "dense gather": Case((6,), 8, rows=70, in_features=36, out_features=20, gather=True),
    "splits": Case((5,), 8, rows=530, in_features=20, out_features=12),  # gram cuts the rows in shares
    "grouped splits": Case((5, 2), 8, 1100, in_features=20, out_features=12, group_sizes=(900, 190)),
    "ragged": Case((0, 3, 16, 5), 16, 72, 40, 24, group_sizes=(7, 0, 64, 1)),  # rank 0, no rows, a full tile, one row
    "hot expert": Case((1, 1, 1, 1), 2, 130, 40, 24, group_sizes=(0, 0, 130, 0), gather=True),
    "rows of no expert": Case((2, 0, 4), 4, 83, 40, 24, group_sizes=(3, 5, 66), gather=True),
    "no expert has rows": Case((3, 4), 4, 6, 40, 24, group_sizes=(0, 0)),
    "one expert": Case((3,), 4, 70, 40, 24, group_sizes=(66,)),
    "experts of two rank tiles": Case((130, 3), 140, 10, 20, 24, group_sizes=(4, 6), gather=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_backend = pytest.mark.parametrize(("backend", "dtype"), EAGER + TRITON, ids=lambda p: str(p).removeprefix("torch."))


def setup(case: Case, backend: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> tuple[ModuleType, Inputs]:
    """The backend's primitives, and inputs where it runs, with u as wide as it makes it."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    width = padded_rank(case.max_rank) if backend == "triton" else case.max_rank
    ops = triton_ops if backend == "triton" else eager
    return ops, make_inputs(case, dtype, width, adapter_dtype=adapter_dtype, device=device)


def check_shrink(ops: ModuleType, inputs: Inputs, max_rank: int, dtype: torch.dtype) -> None:
    u = ops.shrink(inputs.x, inputs.a, inputs.ranks, max_rank, **inputs.table(), row_index=inputs.row_index)
    assert u.dtype == dtype
    assert_parity(u, lambda compute: expected_shrink(inputs, compute), dtype)


def check_expand(ops: ModuleType, inputs: Inputs, base: Tensor | None, gated: bool, dtype: torch.dtype) -> None:
    args = (inputs.u, inputs.b, inputs.ranks, SCALING, inputs.gate if gated else None)
    before = None if base is None else base.clone()
    out = ops.expand(*args, **inputs.table(), base=base)
    assert out.dtype == (dtype if base is None else base.dtype)
    assert_parity(out, lambda compute: expected_expand(inputs, base, gated, compute), dtype)
    if base is not None:
        assert torch.equal(base, before), "expand wrote to its base"
        ops.expand_(before, *args, **inputs.table())
        assert torch.equal(before, out), "expand_ and expand disagree"


def check_gram(ops: ModuleType, inputs: Inputs, gated: bool, dtype: torch.dtype) -> None:
    d = ops.gram(
        inputs.u,
        inputs.x,
        inputs.ranks,
        inputs.a.shape[0],
        SCALING,
        inputs.a.dtype,
        inputs.gate if gated else None,
        **inputs.table(),
        row_index=inputs.row_index,
    )
    assert d.dtype == inputs.a.dtype
    assert_parity(d, lambda compute: expected_gram(inputs, gated, compute), dtype)
    check_dead_rows(inputs, d)


def check_shrink_gram(ops: ModuleType, inputs: Inputs, gated: bool, dtype: torch.dtype) -> None:
    v, d_b, c = ops.shrink_gram(
        inputs.dy, inputs.b, inputs.u, inputs.ranks, SCALING, inputs.gate if gated else None, **inputs.table()
    )
    assert (v.dtype, d_b.dtype, c.dtype) == (dtype, inputs.b.dtype, inputs.gate.dtype)
    for index, actual in enumerate((v, d_b, c)):
        assert_parity(actual, lambda compute, index=index: expected_shrink_gram(inputs, gated, compute)[index], dtype)
    check_dead_rows(inputs, d_b)
    check_dead_rows(inputs, c)


def check_dead_rows(inputs: Inputs, d: Tensor) -> None:
    dead = torch.ones(d.shape[0], dtype=torch.bool, device=d.device)
    for _, own in inputs.experts:
        dead[own] = False
    assert not d[dead].any(), "dead components have a gradient"


@each_backend
@each_case
def test_shrink(case, backend, dtype):
    ops, inputs = setup(case, backend, dtype)
    check_shrink(ops, inputs, case.max_rank, dtype)


@each_backend
@each_case
def test_expand(case, backend, dtype):
    ops, inputs = setup(case, backend, dtype)
    check_expand(ops, inputs, None, True, dtype)
    check_expand(ops, inputs, inputs.base, False, dtype)


@each_backend
@each_case
def test_gram(case, backend, dtype):
    ops, inputs = setup(case, backend, dtype)
    check_gram(ops, inputs, True, dtype)


@each_backend
@each_case
def test_shrink_gram(case, backend, dtype):
    ops, inputs = setup(case, backend, dtype)
    check_shrink_gram(ops, inputs, False, dtype)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["no tile divides", "second rank tile half live", "splits", "ragged", "no rows"])
def test_both_plans_of_shrink_gram(name, fused, monkeypatch):
    """The launcher picks a plan by size; both must hold at every size."""
    monkeypatch.setattr(triton_shrink_gram, "fuses_gram", lambda *_: fused)
    ops, inputs = setup(CASES[name], "triton", torch.float16)
    check_shrink_gram(ops, inputs, True, torch.float16)
