"""What the primitives promise beyond their sums: growth changes no bit, dead components cost and leak nothing,
any memory layout, any size of memory, equal runs, and custom ops that torch.compile can trust.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from lrlora_ops import eager
from lrlora_ops._live import runs
from tests._oracle import SCALING, Case, bits, make_inputs

triton_ops = importlib.import_module("lrlora_ops.kernels.primitives")
padded_rank = importlib.import_module("lrlora_ops.kernels._tiles").padded_rank

DEVICES = {"eager": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
OPS = {"eager": eager, "triton": triton_ops}
RAGGED = Case((0, 3, 16, 5), 16, 76, 40, 24, group_sizes=(7, 0, 64, 1), gather=True)
each_backend = pytest.mark.parametrize("backend", OPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def inputs_for(case, backend, dtype=torch.float32):
    width = padded_rank(case.max_rank) if backend == "triton" else case.max_rank
    return make_inputs(case, dtype, width, device=DEVICES[backend])


def calls(inputs, max_rank):
    """Arguments of each primitive, by name."""
    shared = {"ranks": inputs.ranks, **inputs.table()}
    scaled = {"scaling": SCALING, "gate": inputs.gate, **shared}
    seed = torch.tensor(7, device=inputs.dy.device)
    return {
        "shrink": ((inputs.x, inputs.a), {"max_rank": max_rank, "row_index": inputs.row_index, **shared}),
        "expand": ((inputs.u, inputs.b), {"base": inputs.base, **scaled}),
        "gram": (
            (inputs.u, inputs.x),
            {"pool_size": len(inputs.a), "dtype": inputs.a.dtype, "row_index": inputs.row_index, **scaled},
        ),
        "shrink_gram": ((inputs.dy, inputs.b, inputs.u), scaled),
        "dropout": ((inputs.base,), {"seed": seed, "p": 0.3}),
    }


@each_backend
@pytest.mark.parametrize("name", calls(inputs_for(RAGGED, "eager"), 16))
def test_opcheck(name, backend):
    """Schema, mutation, fake tensors and strides of each custom op, as torch.compile relies on them."""
    inputs = inputs_for(RAGGED, backend)
    inputs.b = inputs.b.t().contiguous().t()
    args, kwargs = calls(inputs, RAGGED.max_rank)[name]
    torch.library.opcheck(getattr(OPS[backend], name), args, kwargs)


@each_backend
@pytest.mark.parametrize("name", calls(inputs_for(RAGGED, "eager"), 16))
def test_equal_runs(name, backend):
    results = []
    for _ in range(2):
        args, kwargs = calls(inputs_for(RAGGED, backend, torch.float16), RAGGED.max_rank)[name]
        result = getattr(OPS[backend], name)(*args, **kwargs)
        results.append(list(bits(args[0] if result is None else result)))
    assert results[0] == results[1]


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 64, 257])
@pytest.mark.parametrize("columns", [1, 48, 100])
def test_growth_changes_no_bit(rows, columns, dtype):
    """Components whose row of b is zero leave the eager output as it is, through every segment of the rank."""
    max_rank = 64
    inputs = make_inputs(Case((max_rank,), max_rank, rows, 40, columns), dtype, max_rank)

    def output(rank: int, b: torch.Tensor) -> torch.Tensor:
        ranks = torch.tensor([rank], dtype=torch.int32)
        return eager.expand(eager.shrink(inputs.x, inputs.a, ranks, max_rank), b, ranks, SCALING, base=inputs.base)

    ranks = (0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64)
    for index, rank in enumerate(ranks):
        b = inputs.b.clone()
        b[rank:] = 0
        before = output(rank, b)
        for grown in ranks[index + 1 :]:
            assert torch.equal(output(grown, b), before), f"rank {rank} -> {grown}"


@each_dtype
def test_growth_changes_no_bit_across_row_blocks(dtype):
    """The eager backend widens blocks of rows; 700 rows of 2048 columns are three of them, the last one shorter."""
    rows, columns, max_rank = 700, 2048, 64
    blocks = eager._blocks(torch.float32, torch.empty(rows, columns, dtype=torch.float16))
    assert [len(block) for (block,) in blocks] == [256, 256, 188]
    inputs = make_inputs(Case((max_rank,), max_rank, rows, columns, columns), dtype, max_rank)
    inputs.b[16:] = 0

    def output(rank: int) -> torch.Tensor:
        ranks = torch.tensor([rank], dtype=torch.int32)
        u = eager.shrink(inputs.x, inputs.a, ranks, max_rank)
        return eager.expand(u, inputs.b, ranks, SCALING, base=inputs.base)

    before = output(16)
    assert not torch.equal(before, inputs.base)
    for grown in (17, 32, 33, 64):  # within the second segment, all of it, into the third
        assert torch.equal(output(grown), before), f"rank 16 -> {grown}"


@each_dtype
def test_growth_of_an_expert_changes_no_bit(dtype):
    """The same where components come from anywhere in the pool, and for the experts that do not grow."""
    case = Case((20, 20), 32, 70, 40, 48, group_sizes=(3, 67))
    inputs = make_inputs(case, dtype, case.max_rank)

    def output(ranks: list[int]) -> torch.Tensor:
        table = {"ranks": torch.tensor(ranks, dtype=torch.int32), **inputs.table()}
        u = eager.shrink(inputs.x, inputs.a, max_rank=case.max_rank, **table)
        return eager.expand(u, inputs.b, scaling=SCALING, base=inputs.base, **table)

    inputs.b[inputs.components[0, 4:20].long()] = 0
    before = output([4, 20])
    for rank in range(5, 21):
        assert torch.equal(output([rank, 20]), before), f"rank 4 -> {rank}"


def test_runs():
    index = torch.tensor([3, 4, 5, 9, 8, 7, 0, 1])
    assert runs(index, [3, 1, 2, 2]) == [3, 9, None, 0]
    assert runs(index[:0], []) == []


def test_dead_segments_are_not_computed():
    """Multiplications of the eager backend follow the live rank, rounded up to a segment."""
    rows, columns, max_rank = 32, 64, 128

    def flops(rank: int) -> int:
        inputs = make_inputs(Case((rank,), max_rank, rows, columns, columns), torch.float32, max_rank)
        with torch.profiler.profile(record_shapes=True) as profile:
            for name in ("shrink", "expand", "gram", "shrink_gram"):
                args, kwargs = calls(inputs, max_rank)[name]
                getattr(eager, name)(*args, **kwargs)
        total = 0
        for event in profile.events():
            if event.name in ("aten::mm", "aten::addmm_"):
                first = 1 if event.name == "aten::addmm_" else 0
                left, right = event.input_shapes[first : first + 2]
                total += 2 * left[0] * left[1] * right[1]
        return total

    per_component = 2 * rows * columns
    assert flops(128) == 5 * 128 * per_component
    assert flops(40) == (3 * 64 + 2 * 40) * per_component  # shrink, expand and V by segments, both grams exactly
    assert flops(0) == 0


@each_backend
def test_any_layout(backend):
    """Transposed, strided and broadcast inputs give what contiguous ones give."""
    case = Case((5, 3), 6, 70, 40, 24, group_sizes=(30, 40))
    ops, inputs = OPS[backend], inputs_for(case, backend)
    inputs.dy = inputs.dy[:, :1].expand(-1, 24)
    plain, strange = {}, {}
    for results, change in ((plain, torch.Tensor.contiguous), (strange, lambda t: t.t().contiguous().t())):
        for field in ("x", "u", "dy", "base", "a", "b"):
            setattr(inputs, field, change(getattr(inputs, field)))
        for name in ("shrink", "expand", "gram", "shrink_gram", "dropout"):
            args, kwargs = calls(inputs, case.max_rank)[name]
            results[name] = getattr(ops, name)(*args, **kwargs)
    torch.testing.assert_close(strange, plain)

    wide = torch.nn.functional.pad(inputs.x, (0, 9))
    args, kwargs = calls(inputs, case.max_rank)["shrink"]
    torch.testing.assert_close(ops.shrink(wide[:, :40], *args[1:], **kwargs), plain["shrink"])
    broadcast = inputs.dy[:, :1].expand(-1, 24)
    args, kwargs = calls(inputs, case.max_rank)["shrink_gram"]
    torch.testing.assert_close(ops.shrink_gram(broadcast, *args[1:], **kwargs), plain["shrink_gram"])


@pytest.mark.parametrize("rank", [-1, 9])
@pytest.mark.parametrize("name", ["shrink", "expand", "gram", "shrink_gram"])
def test_eager_refuses_a_rank_beyond_the_capacity(name, rank):
    """A rank written to the device tensor by hand, which nobody has checked."""
    inputs = inputs_for(Case((3,), 8, 5, 6, 7), "eager")
    inputs.ranks.fill_(rank)
    args, kwargs = calls(inputs, 8)[name]
    with pytest.raises(ValueError, match=f"rank of expert 0 is {rank}; it must be from 0 to 8"):
        getattr(eager, name)(*args, **kwargs)
