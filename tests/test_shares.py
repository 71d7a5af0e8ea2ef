"""Sums over the rows of long experts, which are cut into shares within one launch."""

from __future__ import annotations

import importlib
import math
from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests._oracle import assert_within_budget, bits
from tests.test_gated import DEVICE, SCALING, Inputs, each_dtype, expected_gradients, gradients
from tests.test_moe_launches import launches
from tests.test_moe_lora_mlp import CASES as LAYERS
from tests.test_moe_lora_mlp import DEVICE as DEVICES
from tests.test_moe_lora_mlp import make_layer, run

gradients_module, gram_module = (
    importlib.import_module(f"lrlora_ops.kernels.{name}") for name in ("adapter_gradients", "gram")
)
configs = importlib.import_module("lrlora_ops.kernels._configs")
locate_share = importlib.import_module("lrlora_ops.kernels._shares").locate_share
ROWS = 32

pytestmark = pytest.mark.usefixtures("poison")

CASES = {  # ranks, rows of each expert, rows of no expert, columns
    "a hot expert": ((3, 2, 6, 2), (7, 0, 192, 5), 9, 20),
    "two long ones": ((3, 1), (70, 97), 0, 20),
    "at the limits": ((3, 2, 1, 2), (63, 64, 65, 32), 0, 20),  # 1, 2, 2 and 1 shares
    "one expert": ((2,), (130,), 0, 20),  # its last share has no rows: shares are whole tiles
    "rank 0 is counted": ((0, 3), (100, 70), 3, 20),
    "two rank tiles": ((130, 3), (70, 6), 1, 24),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
telling_case = pytest.mark.parametrize("case", [CASES["a hot expert"], CASES["two rank tiles"]], ids=["hot", "wide"])


@pytest.fixture(autouse=True)
def short_shares(monkeypatch):
    monkeypatch.setattr(gradients_module, "_LEAST_ROWS", ROWS)
    monkeypatch.setattr(gram_module, "rows_of_a_share", lambda *_: ROWS)


def operands(case: tuple, dtype: torch.dtype) -> tuple[Inputs, Tensor, Tensor]:
    inputs = Inputs(case, dtype)
    inputs.weights.abs_()  # as a router's are
    rows = (inputs.dh, inputs.gate_up[:, : inputs.columns])
    return inputs, *(inputs.by_expert(one.nan_to_num(), inputs.a) for one in rows)


@each_case
@each_dtype
def test_parity(case, dtype):
    inputs, u, v = operands(case, dtype)
    actual = gradients(inputs, u, v, True, True)
    exact, plain = (expected_gradients(inputs, u, v, True, True, compute) for compute in (torch.float64, torch.float32))
    terms = [None, None, expected_gradients(inputs, u.abs(), v.abs(), True, True, torch.float64)[2], None]
    for index, (one, value, other) in enumerate(zip(actual, exact, plain, strict=True)):
        if index < 2 and dtype != torch.float32:  # the weighted u and v are rounded before the product
            assert (one.double() - value).abs().max() <= 4 * torch.finfo(dtype).eps * value.abs().max()
        else:
            assert_within_budget(one, value, other, terms[index])
    for result in actual[:3]:
        assert not result[inputs.dead].any()


def gram(inputs: Inputs, u: Tensor, grouped: bool) -> Tensor:
    ranks, components, offsets = inputs.owners
    arguments = (len(inputs.a), SCALING, torch.float32, inputs.gate.nan_to_num())
    if grouped:
        return gram_module.gram(u, inputs.dh, ranks, *arguments, components, offsets)
    return gram_module.gram(u, inputs.dh.nan_to_num(), ranks[:1], *arguments)


SUMS = {
    "adapter_gradients": lambda inputs, u, v: gradients(inputs, u, v, True, True),
    "gram": lambda inputs, u, v: gram(inputs, u, True),
    "gram, dense": lambda inputs, u, v: gram(inputs, u, False),
}


@telling_case
@pytest.mark.parametrize("sums", SUMS.values(), ids=SUMS.keys())
def test_the_order_of_arrival_does_not_matter(sums, case, monkeypatch):
    """Programs run backwards give the same bits: the first share's is then the one that adds up."""
    if torch.cuda.is_available():
        pytest.skip("a GPU's order cannot be chosen")
    inputs, u, v = operands(case, torch.float32)
    results = [list(bits(sums(inputs, u, v)))]
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    forwards, visited = builder.set_grid_idx, []

    def backwards(x: int, y: int, z: int) -> None:
        visited.append(x)
        forwards(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    results.append(list(bits(sums(inputs, u, v))))
    assert visited
    assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.parametrize("sums", SUMS.values(), ids=SUMS.keys())
def test_equal_runs(sums):
    inputs, u, v = operands(CASES["a hot expert"], torch.float32)
    results = [list(bits(sums(inputs, u, v))) for _ in range(20)]
    assert all(one == results[0] for one in results)


@telling_case
@pytest.mark.parametrize("num_counters", [0, 10, 1024])
def test_counters_bound_the_shares(case, num_counters):
    """Whatever their number, the result is right, and no more are counted than an expert has shares."""
    inputs, u, v = operands(case, torch.float32)
    u, v = u.abs(), v.abs()  # so that no sum cancels
    counters = torch.zeros(num_counters + 1, dtype=torch.int32, device=DEVICE)
    counters[-1] = 77  # not the launch's
    counters = counters[:-1]
    zeros = inputs.a.new_zeros(inputs.a.shape), inputs.b.new_zeros(inputs.b.shape), torch.zeros_like(inputs.gate)
    ranks, components, offsets = inputs.owners
    gradients_module.adapter_gradients(
        *(*zeros, None, counters, u, v, inputs.dh, inputs.gate_up, ranks, SCALING, inputs.gate, components, offsets)
    )
    exact, plain = (
        expected_gradients(inputs, u, v, True, False, compute) for compute in (torch.float64, torch.float32)
    )
    for one, value, other in zip(zeros, exact, plain, strict=False):
        assert_within_budget(one, value, other)
    tile = configs.tile_for("adapter_gradients", inputs.width, torch.float32)
    column_tiles = -(-inputs.columns // tile.block_n) - (-2 * inputs.columns // tile.block_n) + 1
    most = num_counters // (column_tiles * (inputs.width // tile.block_r))
    share_rows = max(ROWS, -(-inputs.num_rows // max(most, 1)))
    counted = []
    for rank, size in zip(ranks.tolist(), inputs.sizes, strict=True):
        if size >= 2 * share_rows:
            counted += [size // share_rows] * -(-rank // tile.block_r) * column_tiles
    assert sorted(counters[counters > 0].tolist()) == sorted(counted)
    assert num_counters < 1024 or counted
    assert counters._base[-1] == 77


@triton.jit
def located(
    found_ptr, group_offsets_ptr, num_rows, num_experts, share_rows, GROUPED: tl.constexpr, BLOCK_E: tl.constexpr
):
    found = locate_share(tl.program_id(0), group_offsets_ptr, num_rows, num_experts, share_rows, GROUPED, 8, BLOCK_E)
    for index in tl.static_range(6):
        tl.store(found_ptr + tl.program_id(0) * 6 + index, found[index])


def shares_of(expert: int, first: int, size: int, share_rows: int, slot: int) -> list[list[int]]:
    """As ``locate_share`` finds them, in whole blocks of 8 rows."""
    shares = max(size // share_rows, 1)
    rows = math.ceil(math.ceil(size / shares) / 8) * 8
    starts = [first + share * rows for share in range(shares)]
    return [[expert, n, shares, slot, start, min(start + rows, first + size)] for n, start in enumerate(starts)]


@pytest.mark.parametrize("sizes", [(7, 0, 75, 5), (0, 0), (16,) * 4, (3, 5, 60, 0, 0, 8, 9)])
@pytest.mark.parametrize("share_rows", [4, 16, 100])
def test_every_share_is_located(sizes, share_rows):
    """Each once, in order, then none; slots are dense where an expert has several."""
    bounds = [0, *accumulate(sizes)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    most = sum(sizes) // share_rows + len(sizes)
    found = torch.full((most, 6), -1, dtype=torch.int32, device=DEVICE)
    located[(most,)](found, offsets, sum(sizes), len(sizes), share_rows, True, 1 << (len(sizes) - 1).bit_length())
    expected, slot = [], 0
    for expert, size in enumerate(sizes):
        expected += shares_of(expert, bounds[expert], size, share_rows, slot)
        slot += size // share_rows
    assert found[: len(expected)].tolist() == expected
    assert (found[len(expected) :, 0] >= len(sizes)).all()
    assert slot <= sum(sizes) // share_rows


@pytest.mark.parametrize(("rows", "share_rows"), [(75, 16), (75, 76), (1, 4)])
def test_every_share_of_a_dense_layer_is_located(rows, share_rows):
    expected = shares_of(0, 0, rows, share_rows, 0)
    found = torch.full((len(expected), 6), -1, dtype=torch.int32, device=DEVICE)
    located[(len(expected),)](found, None, rows, 1, share_rows, False, 1)
    assert found.tolist() == expected


@pytest.mark.slow
def test_a_layer_twice(monkeypatch):
    """Counters are zero at each backward, by the launch that zeroes the gradients: none is added."""
    layer = make_layer(LAYERS["silu by name"], DEVICES["triton"])
    _, whole = launches(layer)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in layer.leaves.items()}

    def gradients_of_layer() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(layer, leaves, backend="triton"), list(leaves.values()), layer.dy)

    uncut = gradients_of_layer()
    monkeypatch.setattr(gradients_module, "_LEAST_ROWS", 2)
    _, cut = launches(layer)
    assert cut == whole
    results = [gradients_of_layer() for _ in range(2)]
    assert list(bits(results[0])) == list(bits(results[1]))
    for one, other in zip(results[0], uncut, strict=True):
        torch.testing.assert_close(one, other)
