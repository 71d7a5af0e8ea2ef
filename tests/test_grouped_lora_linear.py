"""grouped_lora_linear: its output and every gradient of both backends against the fp64 oracle, at ranks that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrlora_ops import RankTable, grouped_lora_linear
from lrlora_ops import eager as eager_primitives
from lrlora_ops.reference import grouped_lora_linear_reference
from tests._oracle import assert_within_budget
from tests.test_lora_linear import BACKENDS, DEVICE, SCALING, each_backend
from tests.test_lora_linear_compile import Compiled

pytestmark = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Case:
    """Sizes of a call; ``extra`` rows belong to no expert, and ``frozen`` is "weight", "weight+bias", "base" or ""."""

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    max_rank: int
    in_features: int = 24
    out_features: int = 20
    extra: int = 0
    frozen: str = "weight"
    gated: bool = True
    transposed: bool = False


CASES = {
    "one expert": Case((3,), (9,), 4, frozen="weight+bias"),
    "all ones": Case((1,), (1,), 1, 1, 1),  # Triton specialises on 1
    "ragged": Case((0, 3, 16, 5), (7, 0, 64, 1), 16, 33, 17, extra=4),  # rank 0, no rows, a full tile, a single row
    "transposed": Case((0, 3, 16, 5), (7, 0, 64, 1), 16, 33, 17, frozen="weight+bias", transposed=True),
    "hot expert": Case((1, 1, 7, 1), (0, 0, 70, 0), 8, extra=3, frozen="weight+bias"),
    "base given": Case((2, 0, 9), (5, 6, 7), 9, extra=5, frozen="base"),
    "update alone": Case((2, 0, 9), (5, 6, 7), 9, extra=5, frozen="", gated=False),
    "no expert has rows": Case((2, 3), (0, 0), 4, extra=6),
    "no rows": Case((2, 3), (0, 0), 4, frozen="weight+bias"),
    "rank 0 of all": Case((0, 0), (3, 4), 8, extra=1),
    "empty pool": Case((0, 0), (3, 4), 0, frozen="weight+bias"),
    "0 to 256": Case((256, 0, 129, 17, 1), (6, 3, 5, 2, 4), 256, 40, 30, extra=2),
    "no columns in": Case((2, 1), (3, 2), 2, in_features=0, frozen="base"),
    "no columns out": Case((2, 1), (3, 2), 2, out_features=0, frozen="base"),
}
NAMES = ("x", "lora_A", "lora_B", "gate", "base")


@dataclass
class Call:
    """Operands. What must not be read is NaN: pool rows without an owner, and the rows of no expert."""

    case: Case
    operands: dict[str, Tensor | None]
    frozen: dict[str, Tensor]
    group_offsets: Tensor
    table: RankTable
    dy: Tensor

    @property
    def end(self) -> int:
        return sum(self.case.sizes)

    def dead(self) -> Tensor:
        """bool ``[R]``: the pool rows that no expert owns."""
        owned = [self.table.rows_of(expert) for expert in range(self.table.num_experts)]
        return torch.ones(self.table.pool_size, dtype=torch.bool).index_fill_(0, torch.cat(owned).cpu(), False)


def make_table(ranks: tuple[int, ...], max_rank: int, device: str) -> RankTable:
    """A pool of three rows more than are owned, whose components lie in no order."""
    pool_size = min(sum(ranks) + 3, len(ranks) * max_rank)
    table = RankTable(len(ranks), max_rank, pool_size, device)
    for other in (tuple(rank // 2 for rank in ranks), tuple(rank // 2 for rank in ranks[::-1]), ranks):
        table.set_ranks([min(rank, max_rank) for rank in other])
    return table


def make_call(case: Case, dtype: torch.dtype, backend: str = "eager", adapters=None, base_dtype=None) -> Call:
    generator, device = torch.Generator().manual_seed(0), DEVICE[backend]

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(device, dtype)

    adapters, base_dtype = adapters or dtype, base_dtype or dtype
    table = make_table(case.ranks, case.max_rank, device)
    rows, k, n = sum(case.sizes) + case.extra, case.in_features, case.out_features
    gate = 1 + 0.3 * normal(table.pool_size, dtype=torch.promote_types(dtype, torch.float32)) if case.gated else None
    operands = {
        "x": normal(rows, k),
        "lora_A": normal(table.pool_size, k, size=max(k, 1) ** -0.5, dtype=adapters),
        "lora_B": normal(table.pool_size, n, size=max(case.max_rank, 1) ** -0.5, dtype=adapters),
        "gate": gate,
        "base": normal(rows, n, dtype=base_dtype) if case.frozen == "base" else None,
    }
    if gate is not None and sum(case.ranks):
        gate[table.rows_of(max(range(len(case.ranks)), key=case.ranks.__getitem__))[-1]] = 0  # a probe
    frozen = {}
    if "weight" in case.frozen:
        frozen["weight"] = normal(len(case.ranks), *((k, n) if case.transposed else (n, k)), size=max(k, 1) ** -0.5)
    if "bias" in case.frozen:
        frozen["bias"] = normal(len(case.ranks), n)
    offsets = torch.tensor([0, *case.sizes], device=device).cumsum(0).int()
    call = Call(case, operands, frozen, offsets, table, normal(rows, n, dtype=base_dtype))
    for name in ("lora_A", "lora_B", "gate"):
        if operands[name] is not None:
            operands[name][call.dead().to(device)] = torch.nan
    for tensor in (operands["x"], operands["base"], call.dy):
        if tensor is not None:
            tensor[call.end :] = torch.nan
    return call


def differentiate(call: Call, function: Callable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and the gradient of every operand, as if all operands were of ``dtype``."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for name, t in call.operands.items()
    }
    y = function(**leaves, **{name: t.to(dtype or t.dtype) for name, t in call.frozen.items()})
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(given.values()), call.dy.to(y.dtype), allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, given.values(), strict=True)]
    return {"y": y.detach()} | dict(zip(given, zeros, strict=True))


def plain_grouped(call: Call, x, lora_A, lora_B, gate, base, weight=None, bias=None) -> Tensor:
    """The formula as a PyTorch user writes it, in x's dtype; the output in base's."""
    pieces = []
    for expert, (low, high) in enumerate(pairwise(call.group_offsets.tolist())):
        own = call.table.rows_of(expert)
        u = x[low:high] @ lora_A[own].to(x.dtype).t()
        update = SCALING * (u if gate is None else u * gate[own].to(x.dtype)) @ lora_B[own].to(x.dtype)
        rows = None if base is None else base[low:high]
        if weight is not None:
            matrix = weight[expert].t() if call.case.transposed else weight[expert]
            rows = F.linear(x[low:high], matrix, None if bias is None else bias[expert])
        pieces.append(update if rows is None else rows + update.to(rows.dtype))
    y = torch.cat(pieces)
    return F.pad(y, (0, 0, 0, call.case.extra))


def check(call: Call, backend: str) -> None:
    """Each result has its operand's dtype and is within the budget; what is dead, or of no expert, is exactly zero."""

    def tested(x, lora_A, lora_B, **others):
        settings = {"scaling": SCALING, "transposed": call.case.transposed, "backend": backend}
        return grouped_lora_linear(x, lora_A, lora_B, call.group_offsets, call.table, **others, **settings)

    def exact(x, lora_A, lora_B, **others):
        settings = {"scaling": SCALING, "transposed": call.case.transposed}
        return grouped_lora_linear_reference(x, lora_A, lora_B, call.group_offsets, call.table, **others, **settings)

    actual = differentiate(call, tested)
    plain = differentiate(call, lambda **operands: plain_grouped(call, **operands))
    wanted = differentiate(call, exact, torch.float64)
    for name, value in actual.items():
        if name != "y":
            assert value.dtype == call.operands[name].dtype
        if name in ("y", "x", "base"):
            assert not value[call.end :].any(), f"{name} is not zero in rows of no expert"
        else:
            assert not value[call.dead().to(value.device)].any(), f"dead components of {name} have a gradient"
        assert_within_budget(value, wanted[name], plain[name])


INTERPRETED = ["all ones", "ragged", "transposed", "base given", "no rows", "empty pool"]  # seconds for each
RUNS = [(name, "eager", dtype) for name in CASES for dtype in BACKENDS["eager"]]
RUNS += [(name, "triton", torch.float32) for name in INTERPRETED] + [("hot expert", "triton", torch.float16)]


@pytest.mark.parametrize(("name", "backend", "dtype"), RUNS, ids=str)
def test_output_and_gradients(name, backend, dtype):
    check(make_call(CASES[name], dtype, backend), backend)


@pytest.mark.parametrize("instructions", [True, False], ids=["own", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "transposed", "hot expert", "base given"])
def test_half_precision_of_any_cpu(name, dtype, instructions, monkeypatch):
    """Multiplied as it is, or widened to fp32: whichever this CPU would not choose is tested too."""
    monkeypatch.setattr(eager_primitives, "_compute_dtype", lambda x: x.dtype if instructions else torch.float32)
    monkeypatch.setattr(eager_primitives, "_WEIGHT_ELEMENTS", 200)  # blocks of columns
    check(make_call(CASES[name], dtype), "eager")


MIXED = [  # x, adapters, base
    (torch.float16, torch.float32, None),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, None),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
]


@each_backend
@pytest.mark.parametrize(("dtype", "adapters", "base"), MIXED)
def test_mixed_dtypes(dtype, adapters, base, backend):
    if backend == "triton" and DEVICE["triton"] == "cpu" and torch.bfloat16 in (dtype, adapters, base):
        pytest.skip("interpreted bf16 is garbage: triton-lang/triton#11584")
    case = Case((2, 0, 9), (5, 6, 7), 9, extra=5, frozen="weight" if base is None else "base")
    check(make_call(case, dtype, backend, adapters, base), backend)


@pytest.mark.parametrize("frozen", ["", "base", "weight", "weight+bias"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(frozen, transposed):
    case = Case((2, 0, 3), (2, 1, 0), 3, 4, 3, extra=1, frozen=frozen, transposed=transposed)
    call = make_call(case, torch.float64)
    given = {name: t.nan_to_num_().requires_grad_() for name, t in call.operands.items() if t is not None}

    def function(*leaves: Tensor) -> Tensor:
        operands = dict(zip(given, leaves, strict=True)) | call.frozen
        return grouped_lora_linear(
            **operands, group_offsets=call.group_offsets, table=call.table, scaling=SCALING, transposed=transposed
        )

    assert torch.autograd.gradcheck(function, tuple(given.values()))


def run(call: Call, backend: str = "eager", **others) -> Tensor:
    arguments = call.operands | call.frozen | {"backend": backend, "transposed": call.case.transposed} | others
    return grouped_lora_linear(group_offsets=call.group_offsets, table=call.table, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name):
    """Equals, to the bit, the one that is computed with all others."""
    call = make_call(CASES["base given"], torch.float32)
    everything = differentiate(call, lambda **operands: run(call, **operands))
    leaf = call.operands[name].detach().requires_grad_()
    run(call, **{name: leaf}).backward(call.dy)
    assert torch.equal(leaf.grad, everything[name])


@each_backend
def test_growth_changes_no_bit(backend):
    """A component that is born with ``b = 0``, of the output and of the gradient of x."""
    call = make_call(Case((3, 1, 16), (5, 6, 7), 40, frozen="weight"), torch.float32, backend)
    x = call.operands["x"].requires_grad_()
    results = []
    for ranks in [(3, 1, 16), (4, 1, 18), (4, 2, 16)]:
        for name in ("lora_A", "lora_B"):
            call.operands[name] = call.operands[name].nan_to_num()
        call.operands["gate"] = call.operands["gate"].nan_to_num(1.0)
        call.operands["lora_B"][call.table.set_ranks(ranks)] = 0
        x.grad = None
        y = run(call, backend)
        y.backward(call.dy)
        results.append((y.detach(), x.grad))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@each_backend
def test_ranks_other_than_the_tables(backend):
    """A method samples prefixes: ``ranks`` runs in the place of ``table.ranks``, in the reference too."""
    call = make_call(Case((3, 4, 2), (5, 6, 7), 4), torch.float32, backend)
    ranks = torch.tensor([1, 4, 0], dtype=torch.int32, device=DEVICE[backend])
    y = run(call, backend, ranks=ranks)
    expected = run(call, "reference", ranks=ranks)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, run(call, backend))


@each_backend
def test_demand_counts_rows(backend):
    """Once per backward pass, however small their gradient, unless it is zero."""
    call = make_call(Case((3, 4, 2), (5, 0, 7), 4, extra=2), torch.float32, backend)
    demand = torch.zeros(2, 3, device=DEVICE[backend], requires_grad=True)
    x = call.operands["x"].nan_to_num_().requires_grad_()
    for _ in range(2):
        y = run(call, backend, demand=demand)
        size = torch.full_like(y, 1e-30)
        size[3] = 0
        y.mul(size).sum().backward()
    assert demand.grad.tolist() == [[8, 0, 14]] * 2
    assert x.grad is not None


@each_backend
def test_a_second_differentiation_raises(backend):
    call = make_call(Case((2, 1), (3, 2), 2, frozen="base"), torch.float32, backend)
    x = call.operands["x"].requires_grad_()
    (grad,) = torch.autograd.grad(run(call, backend).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"grouped_lora_linear or moe_lora_mlp was differentiated twice.*backend='reference'"
    ):
        grad.sum().backward()


def test_the_reference_can_be_differentiated_twice():
    call = make_call(Case((2, 1), (3, 2), 2, frozen="weight"), torch.float64)
    call.operands = {name: None if t is None else t.nan_to_num() for name, t in call.operands.items()}
    x = call.operands["x"].requires_grad_()
    (grad,) = torch.autograd.grad(run(call, "reference").square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """x and weight are cast as F.linear casts them, backward runs in the same dtypes, and nothing is cast twice."""
    call = make_call(Case((0, 3, 9), (7, 0, 40), 9, frozen="weight+bias"), torch.float32)
    leaves = [call.operands[name].nan_to_num_().requires_grad_() for name in ("x", "lora_A", "lora_B", "gate")]
    with torch.autocast("cpu", dtype):
        y = run(call)
    assert y.dtype == dtype
    y.backward(call.dy.to(dtype))
    cast = make_call(call.case, dtype, adapters=torch.float32)
    expected = differentiate(cast, lambda **operands: run(cast, **operands))
    assert torch.equal(y, expected["y"])
    for leaf, name in zip(leaves, NAMES, strict=False):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[name].nan_to_num().float())


@each_backend
def test_no_recompilation(backend):
    """Over ranks, groups and batches: forward, all gradients and the row counts equal the uncompiled ones."""
    device = DEVICE[backend]
    table = make_table((3, 0, 6), 8, device)
    lora_A, lora_B = (torch.randn(table.pool_size, n, device=device, requires_grad=True) for n in (9, 7))
    weight, bias = torch.randn(3, 7, 9, device=device), torch.randn(3, 7, device=device)
    demand = torch.zeros(2, 3, device=device, requires_grad=True)
    gate = torch.rand(table.pool_size, device=device, requires_grad=True)

    def function(x: Tensor, group_offsets: Tensor) -> Tensor:
        options = {"weight": weight, "bias": bias, "gate": gate, "demand": demand, "backend": backend}
        return grouped_lora_linear(x, lora_A, lora_B, group_offsets, table, **options)

    torch.compiler.reset()
    compiled = Compiled(function, dynamic=True)
    for ranks, ends in (
        ((3, 0, 6), (2, 4, 9)),
        ((0, 0, 0), (0, 3, 3)),
        ((8, 1, 2), (5, 5, 11)),
        ((1, 1, 8), (1, 2, 4)),
    ):
        table.set_ranks(ranks)
        offsets = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        x = torch.randn(ends[-1] + 2, 9, device=device, requires_grad=True)
        leaves = [x, lora_A, lora_B, gate, demand]
        results = []
        for run_ in (compiled, function):
            y = run_(x, offsets)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_equal_runs():
    call = make_call(CASES["ragged"], torch.float32)
    one, other = (differentiate(call, lambda **operands: run(call, **operands)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
