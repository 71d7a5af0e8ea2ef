"""The gated activation's kernels and the sums over rows, against autograd through plain PyTorch in fp64.

What must not be read is NaN: pool rows of dead components, routing weights and rows of no expert.
"""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._oracle import SCALING, assert_within_budget, bits
from tests.test_addresses import FAR, far, whole_numbers
from tests.test_grouped_lora_linear import make_table
from tests.test_primitives_contract import DEVICES

ops = importlib.import_module("lrlora_ops.kernels.primitives")
gated_module, gradients_module = (
    importlib.import_module(f"lrlora_ops.kernels.{name}") for name in ("gated", "adapter_gradients")
)
DEVICE = DEVICES["triton"]
NUM_COUNTERS = 64

pytestmark = pytest.mark.usefixtures("poison")

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")}
CASES = {  # ranks, rows of each expert, rows of no expert, columns
    "ragged": ((3, 0, 6, 2), (7, 5, 70, 0), 9, 20),
    "all ones": ((1,), (1,), 0, 1),
    "tiles of no expert": ((2, 1), (3, 0), 130, 40),
    "no rows": ((2, 1), (0, 0), 0, 12),
    "no expert has rows": ((2, 3), (0, 0), 6, 12),
    "full tiles": ((16,), (64,), 0, 64),
    "two rank tiles": ((130, 3), (4, 6), 1, 24),
    "rank 0": ((0, 0), (4, 6), 2, 24),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


class Inputs:
    """One call's tensors in ``dtype``; the adapter in fp32. Rows of no expert and dead components are NaN."""

    def __init__(self, case: tuple, dtype: torch.dtype) -> None:
        ranks, self.sizes, nobody, self.columns = case
        generator = torch.Generator().manual_seed(0)
        self.ends = [0, *accumulate(self.sizes)]
        self.num_rows, self.num_owned = self.ends[-1] + nobody, self.ends[-1]
        self.table = make_table(ranks, max(*ranks, 1), DEVICE)
        dead = torch.ones(self.table.pool_size, dtype=torch.bool, device=DEVICE)
        for expert in range(len(ranks)):
            dead[self.table.rows_of(expert)] = False

        def rows(*shape: int) -> Tensor:
            values = torch.randn(self.num_rows, *shape, generator=generator).to(DEVICE, dtype)
            values[self.num_owned :] = torch.nan
            return values

        def pool(columns: int) -> Tensor:
            values = torch.randn(self.table.pool_size, columns, generator=generator).to(DEVICE) / columns**0.5
            values[dead] = torch.nan
            return values

        self.dead = dead
        self.gate_up, self.dh = rows(2 * self.columns), rows(self.columns)
        self.a, self.b, self.gate = pool(self.columns), pool(2 * self.columns), pool(1)[:, 0]
        self.order = torch.randperm(self.num_rows, generator=generator).to(DEVICE)
        self.weights = torch.empty(self.num_rows, device=DEVICE)
        self.weights[self.order] = rows().float()
        self.d_weights = torch.empty(self.num_rows, device=DEVICE)
        self.d_weights[self.order] = rows().float().where(torch.arange(self.num_rows, device=DEVICE) % 3 > 0, 0.0)
        self.width = importlib.import_module("lrlora_ops.kernels._tiles").padded_rank(self.table.max_rank)
        offsets = torch.tensor(self.ends, dtype=torch.int32, device=DEVICE)
        self.owners = (self.table.ranks, self.table.components, offsets)

    def sorted_weights(self, dtype: torch.dtype) -> Tensor:
        return self.weights[self.order][: self.num_owned, None].to(dtype)

    def by_expert(self, rows: Tensor, pool: Tensor) -> Tensor:
        """``[L, WIDTH]``: each expert's rows times the transpose of its components."""
        out = rows.new_zeros(self.num_rows, self.width)
        for expert in range(len(self.sizes)):
            own, part = self.table.rows_of(expert), slice(self.ends[expert], self.ends[expert + 1])
            out[part, : len(own)] = rows[part] @ pool[own].to(rows.dtype).t()
        return out


def zero_padded(values: Tensor, num_rows: int) -> Tensor:
    return torch.cat([values, values.new_zeros(num_rows - len(values), *values.shape[1:])])


def compare(actual: Tensor, exact: Tensor, plain: Tensor, owned: int) -> None:
    assert_within_budget(actual, exact.double(), plain)
    assert not actual[owned:].any(), "rows of no expert are not zero"


def expected_forward(inputs: Inputs, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate, up = inputs.gate_up[: inputs.num_owned].to(dtype).chunk(2, -1)
    h = ACTIVATIONS[activation](gate) * up
    h = zero_padded(h.to(inputs.gate_up.dtype).to(dtype) if dtype != torch.float64 else h, inputs.num_rows)
    return h, inputs.by_expert(h, inputs.a)


@each_case
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(case, dtype, activation):
    inputs = Inputs(case, dtype)
    results = ops.gated_shrink(inputs.gate_up, inputs.a, activation, *inputs.owners)
    exact, plain = (expected_forward(inputs, activation, compute) for compute in (torch.float64, dtype))
    for actual, one, other in zip(results, exact, plain, strict=True):
        assert actual.dtype == dtype
        compare(actual, one, other, inputs.num_owned)


def expected_backward(inputs: Inputs, activation: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """By autograd through ``sum over rows of weight * <h, dh>``."""
    gate_up = inputs.gate_up[: inputs.num_owned].to(dtype).requires_grad_()
    weights = inputs.sorted_weights(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    h = ACTIVATIONS[activation](gate) * up
    loss = (weights * h * inputs.dh[: inputs.num_owned].to(dtype)).sum()
    d_gate_up, d_weights = torch.autograd.grad(loss, (gate_up, weights))
    padded = [zero_padded(t.detach(), inputs.num_rows) for t in (d_gate_up, h, d_weights[:, 0])]
    by_pair = torch.zeros_like(padded[2])
    by_pair[inputs.order] = padded[2]
    return padded[0], padded[1], inputs.by_expert(padded[0], inputs.b), by_pair


@each_case
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(case, dtype, activation):
    inputs = Inputs(case, dtype)
    operands = (inputs.dh, inputs.gate_up, inputs.b, inputs.weights.view(-1, 1), inputs.order, activation)
    *rows, d_weights = ops.gated_shrink_backward(*operands, *inputs.owners)
    exact, plain = (expected_backward(inputs, activation, compute) for compute in (torch.float64, dtype))
    for actual, one, other in zip(rows, exact, plain, strict=False):
        assert actual.dtype == dtype
        compare(actual, one, other, inputs.num_owned)
    # Of products of rounded h and dh; the sums of plain PyTorch in half precision are no measure.
    assert_within_budget(d_weights.flatten(), exact[3], expected_backward(inputs, activation, torch.float32)[3])
    assert not d_weights.flatten()[inputs.order[inputs.num_owned :]].any()


def expected_gradients(inputs: Inputs, u: Tensor, v: Tensor, gated: bool, weighted: bool, dtype: torch.dtype):
    pool = inputs.table.pool_size
    d_a, d_b, c = (torch.zeros(pool, n, dtype=dtype, device=DEVICE) for n in (inputs.columns, 2 * inputs.columns, 1))
    demand = torch.zeros(2, len(inputs.sizes), dtype=dtype, device=DEVICE)
    weights = inputs.sorted_weights(dtype)
    weights = weights if weighted else torch.ones_like(weights)
    for expert in range(len(inputs.sizes)):
        own, part = inputs.table.rows_of(expert), slice(inputs.ends[expert], inputs.ends[expert + 1])
        left, right = (t[part, : len(own)].to(dtype) for t in (u, v))
        factor = SCALING * (inputs.gate[own, None].to(dtype) if gated else 1)
        d_a[own] = factor * (weights[part] * right).t() @ inputs.dh[part].to(dtype)
        d_b[own] = factor * (weights[part] * left).t() @ inputs.gate_up[part].to(dtype)
        c[own, 0] = SCALING * (weights[part] * left * right).sum(0)
        routed = weights[part][inputs.d_weights[inputs.order][part] != 0]
        demand[:, expert] = torch.stack([demand.new_tensor(len(routed)), routed.sum()])
    return d_a, d_b, c[:, 0], demand


def gradients(inputs: Inputs, u: Tensor, v: Tensor, gated: bool, weighted: bool) -> tuple[Tensor, ...]:
    """x is ``dh`` and dy ``gate_up``, each gathered from a copy in another order."""
    index = torch.randperm(inputs.num_rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x, dy = torch.empty_like(inputs.dh), torch.empty_like(inputs.gate_up)
    x[index], dy[index] = inputs.dh, inputs.gate_up
    zeros = inputs.a.new_zeros(inputs.a.shape), inputs.b.new_zeros(inputs.b.shape), torch.zeros_like(inputs.gate)
    demand = torch.full((2, len(inputs.sizes)), torch.nan, device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    ranks, components, offsets = inputs.owners
    weights = {"weights": inputs.weights.view(-1, 1)} if weighted else {}
    ops.adapter_gradients(
        *(*zeros, demand, counters, u, v, x, dy, ranks, SCALING, inputs.gate if gated else None, components, offsets),
        **{"x_index": index, "dy_index": index, "row_order": inputs.order, "d_weights": inputs.d_weights} | weights,
    )
    return *zeros, demand


@each_case
@each_dtype
@pytest.mark.parametrize(("gated", "weighted"), [(True, True), (False, False)])
def test_adapter_gradients(case, dtype, gated, weighted):
    inputs = Inputs(case, dtype)
    u, v = (inputs.by_expert(rows[:, : inputs.columns].nan_to_num(), inputs.a) for rows in (inputs.dh, inputs.gate_up))
    actual = gradients(inputs, u, v, gated, weighted)
    exact, plain = (
        expected_gradients(inputs, u, v, gated, weighted, compute) for compute in (torch.float64, torch.float32)
    )
    for index, (one, value, other) in enumerate(zip(actual, exact, plain, strict=True)):
        # Half precision rounds the weighted u and v before the product, as the unfused form does.
        rounding = torch.finfo(dtype).eps if index < 2 and weighted and dtype != torch.float32 else 0.0
        largest = value.abs().max().item() if value.numel() else 0.0
        if rounding:
            assert (one.double() - value).abs().max() <= 4 * rounding * max(largest, 1.0)
        else:
            assert_within_budget(one, value, other)
    for result in actual[:3]:
        assert not result[inputs.dead].any()


def calls() -> dict[str, tuple[Any, ...]]:
    inputs = Inputs(CASES["ragged"], torch.float32)
    ranks, components, offsets = inputs.owners
    u = inputs.by_expert(inputs.dh.nan_to_num(), inputs.a)
    weights = inputs.weights.nan_to_num().view(-1, 1)
    zeros = inputs.a.new_zeros(inputs.a.shape), inputs.b.new_zeros(inputs.b.shape), torch.zeros_like(inputs.gate)
    demand, rows = torch.zeros(2, len(inputs.sizes), device=DEVICE), (inputs.dh.nan_to_num(), inputs.gate_up)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    return {
        "gated_shrink": (inputs.gate_up, inputs.a, "silu", *inputs.owners),
        "gated_shrink_backward": (*rows, inputs.b, weights, inputs.order, "silu", *inputs.owners),
        "adapter_gradients": (
            *(*zeros, demand, counters, u, u, *rows, ranks, SCALING, inputs.gate, components, offsets),
            *(inputs.order, inputs.order, weights, inputs.order, weights),
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name), calls()[name])


@pytest.mark.parametrize("name", calls())
def test_equal_runs(name):
    results = []
    for _ in range(2):
        args = calls()[name]
        out = getattr(ops, name)(*args)
        results.append(list(bits(args[:4] if out is None else out)))
    assert results[0] == results[1]


sparse_memory = pytest.mark.skipif(torch.cuda.is_available(), reason="the mapping is host memory, for the interpreter")
ROWS, COLUMNS, RANK, WIDTH = 4, 8, 3, 16


def far_table(max_rank: int = RANK) -> dict[str, Any]:
    """The only expert owns the far rows, and the far pool rows out of order."""
    return {
        "ranks_ptr": torch.tensor([RANK], dtype=torch.int32),
        "components_ptr": torch.tensor([[FAR + 2, FAR, FAR + 1]], dtype=torch.int32),
        "group_offsets_ptr": torch.tensor([FAR, FAR + ROWS], dtype=torch.int32),
        **{"num_experts": 1, "max_rank": max_rank, "WIDTH": WIDTH, "PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_R": 16},
    }


def empty_far(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return far(torch.full(shape, torch.nan, dtype=dtype))


@sparse_memory
def test_gated_addresses():
    """Rows, pool rows and pairs past 2^31 elements; both kernels agree with plain PyTorch."""
    (gate_up, gate_up_rows), (dh, dh_rows) = (
        far(whole_numbers(ROWS, n, dtype=torch.float32)) for n in (2 * COLUMNS, COLUMNS)
    )
    (a, a_rows), (b, b_rows) = (far(whole_numbers(RANK, n, dtype=torch.float32)) for n in (COLUMNS, 2 * COLUMNS))
    (h, h_rows), (u, u_rows), (v, v_rows) = (empty_far(ROWS, n) for n in (COLUMNS, WIDTH, WIDTH))
    d_gate_up, d_rows = empty_far(ROWS, 2 * COLUMNS)
    order, _ = far(torch.arange(FAR, FAR + ROWS)[:, None])
    (weights, weight_rows), (d_weights, d_weight_rows) = far(torch.full((ROWS, 1), 2.0)), empty_far(ROWS, 1)
    sizes = {"num_rows": FAR + ROWS, "num_cols": COLUMNS, "ACTIVATION": "silu", "BLOCK_E": 1, "BLOCK_K": 16}
    gated_module.gated_shrink_kernel[(1, 1)](gate_up_ptr=gate_up, a_ptr=a, h_ptr=h, u_ptr=u, **sizes, **far_table())
    gate, up = gate_up_rows.clone().requires_grad_().chunk(2, -1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(h_rows, expected.detach())
    torch.testing.assert_close(u_rows[:, :RANK], h_rows @ a_rows[[2, 0, 1]].t())
    h_rows.fill_(torch.nan)
    gated_module.gated_shrink_backward_kernel[(1, 1)](
        dh_ptr=dh, gate_up_ptr=gate_up, b_ptr=b, weights_ptr=weights, row_order_ptr=order, d_gate_up_ptr=d_gate_up,
        h_ptr=h, v_ptr=v, d_weights_ptr=d_weights, **sizes, **far_table(),
    )  # fmt: skip
    grads = torch.autograd.grad((expected * dh_rows * weight_rows).sum(), (gate, up))
    torch.testing.assert_close(d_rows, torch.cat(grads, 1))
    torch.testing.assert_close(h_rows, expected.detach())
    torch.testing.assert_close(v_rows[:, :RANK], d_rows @ b_rows[[2, 0, 1]].t())
    torch.testing.assert_close(d_weight_rows[:, 0], (expected * dh_rows).sum(1).detach())


@sparse_memory
def test_adapter_gradients_addresses():
    operands = {name: far(whole_numbers(ROWS, n, dtype=torch.float32)) for name, n in (("u", 16), ("v", 16))}
    operands |= {"x": far(whole_numbers(ROWS, 24)), "dy": far(whole_numbers(ROWS, 20))}
    outputs = {name: empty_far(RANK, n) for name, n in (("d_a", 24), ("d_b", 20), ("c", 1))}
    order, _ = far(torch.arange(FAR, FAR + ROWS)[:, None])
    (weights, _), (d_weights, _) = far(torch.full((ROWS, 1), 2.0)), far(torch.tensor([[1.0], [0.0], [-1.0], [1.0]]))
    demand = torch.empty(2, 1)
    outputs["partial"] = outputs["counters"] = (torch.empty(0), torch.empty(0))
    gradients_module.adapter_gradients_kernel[(2 + 2 + 1,)](
        **{f"{name}_ptr": start for name, (start, _) in (operands | outputs).items()},
        demand_ptr=demand, gate_ptr=None, x_index_ptr=order, dy_index_ptr=order, weights_ptr=weights,
        d_weights_ptr=d_weights, row_order_ptr=order, in_features=24, out_features=20, stride_xm=24, stride_dym=20,
        scaling=0.5, num_rows=FAR + ROWS, share_rows=ROWS,
        HAS_GATE=False, IS_HIP=False, BLOCK_E=1,
        HAS_X_INDEX=True, HAS_DY_INDEX=True, HAS_WEIGHTS=True, HAS_DEMAND=True, BLOCK_N=16, **far_table(),
    )  # fmt: skip
    u, v, x, dy = (rows.float() for _, rows in operands.values())
    expected = {"d_a": v[:, :RANK].t() @ x, "d_b": u[:, :RANK].t() @ dy, "c": (u * v)[:, :RANK].sum(0)[:, None]}
    for name, value in expected.items():
        assert torch.equal(outputs[name][1][[2, 0, 1]], value), name
    assert demand.tolist() == [[3], [6]]
