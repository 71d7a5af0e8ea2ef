"""The primitives of both backends against the fp64 oracle, in every dtype that the machine can check.

The Triton launchers run interpreted where there is no GPU. Interpreted bf16 is garbage (triton-lang/triton#11584);
``test_primitives_gpu.py`` covers it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
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
    sensitivity_terms,
)

triton_ops = importlib.import_module("lrlora_ops.kernels.primitives")
triton_gram = importlib.import_module("lrlora_ops.kernels.gram")
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
    "second rank tile partly live": Case((136,), 256, rows=20, in_features=48, out_features=40),
    "second rank tile dead": Case((100,), 256, rows=20, in_features=48, out_features=40),
    "dense gather": Case((6,), 8, rows=70, in_features=36, out_features=20, gather=True),
    "ragged": Case((0, 3, 16, 5), 16, 72, 40, 24, group_sizes=(7, 0, 64, 1)),  # rank 0, no rows, a full tile, one row
    "hot expert": Case((4, 4, 4, 4), 5, 130, 40, 24, group_sizes=(0, 0, 130, 0), gather=True),
    "rows of no expert": Case((2, 0, 4), 4, 83, 40, 24, group_sizes=(3, 5, 66), gather=True),
    "no expert has rows": Case((3, 4), 4, 6, 40, 24, group_sizes=(0, 0)),
    "one expert": Case((3,), 4, 70, 40, 24, group_sizes=(66,)),
    "pool rows in order": Case((16, 5, 40), 40, 72, 40, 24, group_sizes=(7, 1, 64), in_order=True),
    "experts of two rank tiles": Case((130, 3), 140, 10, 20, 24, group_sizes=(4, 6), gather=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_backend = pytest.mark.parametrize(
    ("backend", "dtype"), EAGER + TRITON, ids=lambda p: str(p).removeprefix("torch.")
)


def setup(
    case: Case, backend: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None
) -> tuple[ModuleType, Inputs]:
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
    for index, (actual, terms) in enumerate(((v, None), (d_b, None), (c, sensitivity_terms(inputs)))):
        assert_parity(
            actual, lambda compute, index=index: expected_shrink_gram(inputs, gated, compute)[index], dtype, terms
        )
    check_dead_rows(inputs, d_b)
    check_dead_rows(inputs, c)


def check_all(ops: ModuleType, inputs: Inputs, max_rank: int, dtype: torch.dtype) -> None:
    check_shrink(ops, inputs, max_rank, dtype)
    check_expand(ops, inputs, inputs.base, True, dtype)
    check_gram(ops, inputs, True, dtype)
    check_shrink_gram(ops, inputs, True, dtype)


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
@pytest.mark.parametrize("name", ["no tile divides", "second rank tile partly live", "ragged", "no rows"])
def test_both_plans_of_shrink_gram(name, fused, monkeypatch):
    """The launcher picks a plan by size; both must hold at every size."""
    monkeypatch.setattr(triton_shrink_gram, "fuses_gram", lambda *_: fused)
    ops, inputs = setup(CASES[name], "triton", torch.float16)
    check_shrink_gram(ops, inputs, True, torch.float16)


SHARED = {
    **{name: CASES[name] for name in ("no tile divides", "second rank tile partly live", "ragged", "dense gather")},
    "long experts": Case((3, 0, 2, 5), 5, 420, 150, 24, group_sizes=(130, 3, 7, 270), gather=True),
}


@pytest.mark.parametrize("rows", [32, 13])  # of 65: two unequal shares, and shares without a row
@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED.keys())
def test_gram_of_shares(case, rows, monkeypatch):
    """The launcher shares long sums out over programs; they must not depend on how many."""
    monkeypatch.setattr(triton_gram, "rows_of_a_share", lambda *_: rows)
    ops, inputs = setup(case, "triton", torch.float16)
    check_gram(ops, inputs, True, torch.float16)


def test_shares_fill_the_machine_and_are_worth_a_program():
    rows = triton_gram.rows_of_a_share
    assert rows(8192, 32, False, 64) == 1024  # 8 shares of 32 results: 256 programs
    assert 8191 // rows(8191, 32, False, 64) == 8
    assert rows(1000, 1, False, 64) == 256
    assert rows(100, 1, False, 64) == 100  # too few to be cut
    assert rows(65536, 16, True, 64) == 1024  # a hot expert of 8192 rows: 8 shares
    assert rows(2**20, 512, False, 64) == 2**20  # the columns alone fill the machine


@pytest.mark.parametrize("name", ["no tile divides", "ragged"])
@pytest.mark.parametrize(("backend", "dtype"), [("eager", torch.float16), ("eager", torch.bfloat16), TRITON[1]])
def test_adapters_in_fp32(name, backend, dtype):
    """Half-precision activations, fp32 adapters and gradients, and a base that a layer in fp32 computed."""
    case = CASES[name]
    ops, inputs = setup(case, backend, dtype, adapter_dtype=torch.float32)
    check_all(ops, inputs, case.max_rank, dtype)
    check_expand(ops, inputs, inputs.base.float(), True, dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gram_of_two_dtypes(backend):
    """V of an fp32 output and a half-precision x: summed as x is."""
    ops, inputs = setup(CASES["ragged"], backend, torch.float16)
    inputs.u = inputs.u.float()
    check_gram(ops, inputs, True, torch.float16)


# The bounds of BLOCK_R and of eager's segments; eager is checked at every rank.
@pytest.mark.parametrize("max_rank", [1, 16, 17, 33, 64, 65, 128, 129, 256])
def test_any_rank(max_rank):
    case = Case((max_rank,), max_rank, rows=2, in_features=3, out_features=5)
    check_all(*setup(case, "triton", torch.float16), max_rank, torch.float16)


def test_any_rank_eager():
    for rank in range(257):
        case = Case((rank,), 256, rows=2, in_features=3, out_features=5)
        check_all(*setup(case, "eager", torch.float64), 256, torch.float64)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(sizes=st.lists(st.integers(0, 140), min_size=1, max_size=4), trailing=st.integers(0, 70), data=st.data())
def test_any_grouping(sizes, trailing, data):
    """Every row is in one tile, and every tile in one slab of its expert, however the rows are dealt out.

    Sums of small whole numbers are exact in any order.
    """
    ranks = data.draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    case = Case(tuple(ranks), 5, sum(sizes) + trailing, 3, 5, group_sizes=tuple(sizes))
    for backend in ("eager", "triton"):
        ops, inputs = setup(case, backend, torch.float32)
        inputs.use_whole_numbers()
        actual = ops.shrink_gram(inputs.dy, inputs.b, inputs.u, inputs.ranks, SCALING, **inputs.table())
        for got, exact in zip(actual, expected_shrink_gram(inputs, False, torch.float64), strict=True):
            assert torch.equal(got.double(), exact)
