"""Every public op and each gradient beside plain PyTorch in fp64: at real sizes on a GPU, at small ones on a CPU.

One table for both, so that what runs on the GPU has been run before. Fresh tensors are NaN, dead components and rows of
no expert too; the error allowed is that of ``_oracle.assert_within_budget``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrlora_ops import (
    ExpertLinear,
    RankTable,
    SincExpertLinear,
    VariableRankLoRAExperts,
    grouped_lora_linear,
    lora_linear,
    moe_lora_mlp,
    moe_sinc_mlp,
    sinc_lora_linear,
)
from lrlora_ops.modules.experts import run_experts
from tests._oracle import SCALING, assert_within_budget, bits

pytestmark = pytest.mark.usefixtures("poison")

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Rows or tokens, features in and out (or hidden and intermediate), experts (0: dense), top_k, capacity.

    ``hot`` sends every token to one expert.
    """

    rows: int
    k: int
    n: int
    experts: int = 0
    top_k: int = 1
    capacity: int = 16
    hot: bool = False


@dataclass
class Problem:
    """What is differentiated, the op itself, and the same in plain PyTorch in the dtype of the leaves it is given.

    ``terms`` are of gradients that are few sums of many terms, which may cancel: the sums of the terms' magnitudes.
    Differentiating ``plain`` in fp64 adds them up.
    """

    leaves: Leaves
    op: Callable[[Leaves], Tensor]
    plain: Callable[[Leaves], Tensor]
    terms: Leaves = field(default_factory=dict)


class Maker:
    """Random tensors of order one for a problem."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, backend: str | None) -> None:
        self.size, self.dtype, self.device, self.backend = size, dtype, device, backend
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def factors(self, pool: int, live: Tensor, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and gates, of which the rows ``live`` are not NaN; the last one is a probe, with a gate of zero."""
        dead = torch.ones(pool, dtype=torch.bool, device=self.device)
        dead[live] = False
        gate = 1 + 0.3 * self.normal(pool, dtype=torch.float32)
        gate[live[-1]] = 0
        made = (self.normal(pool, k, scale=k**-0.5), self.normal(pool, n, scale=self.size.capacity**-0.5), gate)
        for values in made:
            values[dead] = torch.nan
        return made

    def table(self) -> RankTable:
        """Ranks of 0, 1, a quarter of the capacity and all of it, whose pool rows lie in no order."""
        size = self.size
        wanted = [(0, 1, size.capacity // 4, size.capacity)[expert % 4] for expert in range(size.experts)]
        table = RankTable.uniform(size.experts, 0, size.capacity, sum(wanted) + 3).to(self.device)
        table.set_ranks([rank // 2 for rank in wanted])
        table.set_ranks(wanted[::-1])
        table.set_ranks([min(rank, other) for rank, other in zip(wanted, wanted[::-1], strict=True)])
        table.set_ranks(wanted)
        return table

    def offsets(self) -> Tensor:
        """Rows falling as 1 / n, the last expert without any; rounding leaves some to no expert."""
        weights = [1 / (n + 1) for n in range(self.size.experts - 1)] + [0.0]
        sizes = [int(self.size.rows * weight / sum(weights)) for weight in weights]
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=self.device)


def owned(table: RankTable) -> Tensor:
    """The pool rows of all experts, in their order."""
    return torch.cat([table.rows_of(expert) for expert in range(table.num_experts)])


def low_rank(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    return SCALING * ((x @ a.t()) * gate.to(x.dtype)) @ b


def dense(make: Maker, biased: bool = True, dropout: float = 0.0, own_base: bool = False) -> Problem:
    """``lora_linear``, three quarters of the components alive, the others NaN."""
    size = make.size
    live = max(3 * size.capacity // 4, 1)
    a, b, gate = make.factors(size.capacity, torch.arange(live, device=make.device), size.k, size.n)
    weight, bias = make.normal(size.n, size.k, scale=size.k**-0.5), make.normal(size.n)
    leaves = {"x": make.normal(size.rows, size.k), "A": a, "B": b, "gate": gate}
    if own_base:
        leaves["base"] = make.normal(size.rows, size.n)
    rank = torch.tensor(live, dtype=torch.int32, device=make.device)

    def op(t: Leaves) -> Tensor:
        torch.manual_seed(3)
        base = {"base": t["base"]} if own_base else {"weight": weight, "bias": bias if biased else None}
        options: dict[str, Any] = {"gate": t["gate"], "rank": rank, "scaling": SCALING, "dropout": dropout, **base}
        return lora_linear(t["x"], t["A"], t["B"], backend=make.backend, **options)

    dropped = dropout_mask(size, make.device, dropout) if dropout else None

    def plain(t: Leaves) -> Tensor:
        x = t["x"]
        base = t["base"] if own_base else F.linear(x, weight.to(x.dtype), bias.to(x.dtype) if biased else None)
        x = x if dropped is None else x * dropped.to(x.dtype)
        return base + low_rank(x, t["A"][:live], t["B"][:live], t["gate"][:live])

    return Problem(leaves, op, plain)


def dropout_mask(size: Size, device: str, p: float) -> Tensor:
    """What the op multiplies x by after ``manual_seed(3)``: ones through adapters that copy 64 columns each."""
    ones, found = torch.ones(size.rows, size.k, device=device), []
    for pick in torch.eye(size.k, device=device).split(64):
        torch.manual_seed(3)
        found.append(lora_linear(ones, pick, torch.eye(len(pick), device=device), dropout=p))
    return torch.cat(found, 1)


def grouped(make: Maker, transposed: bool) -> Problem:
    """``grouped_lora_linear``: ragged rows, ranks from 0 to the capacity, biases, rows of no expert."""
    size, table, offsets = make.size, make.table(), make.offsets()
    a, b, gate = make.factors(table.pool_size, owned(table), size.k, size.n)
    weight, bias = make.normal(size.experts, size.n, size.k, scale=size.k**-0.5), make.normal(size.experts, size.n)
    bounds = list(pairwise(offsets.tolist()))
    x = make.normal(size.rows, size.k)
    x[bounds[-1][1] :] = torch.nan

    def op(t: Leaves) -> Tensor:
        stored = weight.transpose(1, 2).contiguous() if transposed else weight
        options: dict[str, Any] = {"weight": stored, "bias": bias, "transposed": transposed, "scaling": SCALING}
        adapter = (t["A"], t["B"], offsets, table)
        return grouped_lora_linear(t["x"], *adapter, gate=t["gate"], backend=make.backend, **options)

    def plain(t: Leaves) -> Tensor:
        rows = []
        for expert, (first, end) in enumerate(bounds):
            own, own_x = table.rows_of(expert), t["x"][first:end]
            base = F.linear(own_x, weight[expert].to(own_x.dtype), bias[expert].to(own_x.dtype))
            rows.append(base + low_rank(own_x, t["A"][own], t["B"][own], t["gate"][own]))
        return torch.cat([*rows, t["x"].new_zeros(size.rows - bounds[-1][1], size.n)])

    return Problem({"x": x, "A": a, "B": b, "gate": gate}, op, plain)


def glu(rows: Tensor) -> Tensor:
    """What "silu" names."""
    left, right = rows.chunk(2, -1)
    return F.silu(left) * right


def moe(make: Maker, module: bool = False, activation: Callable[[Tensor], Tensor] | str = glu) -> Problem:
    """``moe_lora_mlp``, or transformers' experts with the adapter of this library; a token in 16 has lost an expert."""
    size, table = make.size, make.table()
    hidden, inner, experts = size.k, size.n, size.experts
    leaves = {"x": make.normal(size.rows, hidden), "route": make.normal(size.rows, size.top_k).abs()}
    weights = {"up": make.normal(experts, 2 * inner, hidden, scale=hidden**-0.5)}
    weights["down"] = make.normal(experts, hidden, inner, scale=inner**-0.5)
    for name, weight in weights.items():
        pool = make.factors(table.pool_size, owned(table), weight.shape[2], weight.shape[1])
        leaves |= {f"{name}.{part}": value for part, value in zip(("A", "B", "gate"), pool, strict=True)}
    scores = torch.rand(size.rows, experts, generator=make.generator, device=make.device)
    scores[:, 3] += 2.0 * size.hot  # its rank is the capacity
    index = scores.topk(size.top_k).indices
    if not module:
        index[::16, 0] = experts

    def op(t: Leaves) -> Tensor:
        up, down = (ExpertLinear(weights[name], t[f"{name}.A"], t[f"{name}.B"], t[f"{name}.gate"]) for name in weights)
        options: dict[str, Any] = {"activation": activation, "scaling": SCALING, "backend": make.backend}
        return moe_lora_mlp(t["x"], index, t["route"], up, down, table, **options)

    def plain(t: Leaves) -> Tensor:
        y = torch.zeros_like(t["x"])
        for expert in range(experts):
            tokens, choice = (index == expert).nonzero(as_tuple=True)
            rows, own = t["x"][tokens], table.rows_of(expert)
            for name in weights:
                adapter = low_rank(rows, *(t[f"{name}.{part}"][own] for part in ("A", "B", "gate")))
                rows = rows @ weights[name][expert].to(rows.dtype).t() + adapter
                rows = glu(rows) if name == "up" else rows
            y = y.index_add(0, tokens, rows * t["route"][tokens, choice, None])
        return y

    if not module:
        return Problem(leaves, op, plain)
    return Problem(leaves, transformers_experts(make, table, leaves, weights, index), plain)


def transformers_experts(
    make: Maker, table: RankTable, leaves: Leaves, weights: Leaves, index: Tensor
) -> Callable[[Leaves], Tensor]:
    """The forward pass of OLMoE's experts module with an adapter of the table's ranks and the leaves as parameters."""
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe", reason="needs transformers")
    size = make.size
    config = olmoe.OlmoeConfig(
        hidden_size=size.k, intermediate_size=size.n, num_experts=size.experts, num_experts_per_tok=size.top_k
    )
    with torch.device("meta"):
        host = olmoe.OlmoeExperts(config)
    for name, weight in weights.items():
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        setattr(host, {"up": "gate_up_proj", "down": "down_proj"}[name], parameter)
    adapter = VariableRankLoRAExperts.from_experts(
        host, max_rank=size.capacity, rank=0, lora_alpha=SCALING * size.capacity, dtype=make.dtype
    )
    ranks = table.ranks.tolist()
    adapter.set_ranks(ranks)
    rows, theirs = owned(adapter.table), owned(table)

    def forward(t: Leaves) -> Tensor:
        parts: list[tuple[Tensor, ...]] = []
        for name in weights:
            pools = (t[f"{name}.{part}"] for part in ("A", "B", "gate"))
            size_of = adapter.table.pool_size
            parts.append(tuple(p.new_zeros(size_of, *p.shape[1:]).index_copy(0, rows, p[theirs]) for p in pools))
        return run_experts(host, t["x"], index, t["route"], parts, adapter.table, scaling=adapter.scaling)

    return forward


def moving(make: Maker, name: str, k: int, n: int, experts: int = 1) -> tuple[Leaves, float]:
    """A, B and nine coefficients, by name, and the grid: elements of ``B^T A`` are about two steps of it wide."""
    rank, grid = make.size.capacity, 0.5 * k**-0.5
    factors = make.normal(experts * rank, k, scale=k**-0.5), make.normal(experts * rank, n, scale=rank**-0.5)
    c = make.normal(9, scale=grid, dtype=torch.float32)
    return {f"{name}A": factors[0], f"{name}B": factors[1], f"{name}c": c}, grid


def moved(weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, dtype: torch.dtype, terms: Tensor) -> Tensor:
    """``W + scaling * phi(B^T A)``, in fp32 or wider, and rounded once; a basis function is at most 1.22 in size.

    Adds to ``terms`` the magnitudes in the sum that is the gradient of c. They are rounded in the weight's dtype, each
    by itself, so of that rounding the root of the sum of their squares counts.
    """
    sums = torch.promote_types(dtype, torch.float32)
    phi = z = b.to(sums).t() @ a.to(sums)
    for k, own in enumerate(c.to(sums), -4):
        phi = phi + own * (torch.sinc(z / grid - k) - float(k == 0))
    result = (weight.to(sums) + SCALING * phi).to(dtype)

    def add_up(m: Tensor) -> None:
        roundings = torch.finfo(weight.dtype).eps / torch.finfo(torch.float32).eps
        terms.add_(1.22 * SCALING * (m.abs().sum() + roundings * m.norm()))

    if dtype == torch.float64:
        result.register_hook(add_up)
    return result


def sinc(make: Maker) -> Problem:
    """``sinc_lora_linear``, the capacity its rank."""
    size = make.size
    own, grid = moving(make, "", size.k, size.n)
    x = make.normal(size.rows, size.k)
    weight, bias = make.normal(size.n, size.k, scale=size.k**-0.5), make.normal(size.n)

    def op(t: Leaves) -> Tensor:
        options: dict[str, Any] = {"grid": grid, "scaling": SCALING, "bias": bias, "backend": make.backend}
        return sinc_lora_linear(t["x"], weight, t["A"], t["B"], t["c"], **options)

    def plain(t: Leaves) -> Tensor:
        x = t["x"]
        return F.linear(x, moved(weight, t["A"], t["B"], t["c"], grid, x.dtype, terms["c"]), bias.to(x.dtype))

    terms = {"c": x.new_zeros((), dtype=torch.float64)}
    return Problem({"x": x, **own}, op, plain, terms)


def sinc_moe(make: Maker) -> Problem:
    """``moe_sinc_mlp``, the capacity the rank of every expert; the last expert has no rows."""
    size = make.size
    sizes = {"up.": (size.k, 2 * size.n), "down.": (size.n, size.k)}
    leaves = {"x": make.normal(size.rows, size.k), "route": make.normal(size.rows, size.top_k).abs()}
    grids, weights = {}, {}
    for name, (k, n) in sizes.items():
        own, grids[name] = moving(make, name, k, n, size.experts)
        leaves |= own
        weights[name] = make.normal(size.experts, n, k, scale=k**-0.5)
    scores = torch.rand(size.rows, size.experts - 1, generator=make.generator, device=make.device)
    index = scores.topk(size.top_k).indices

    def op(t: Leaves) -> Tensor:
        up, down = (
            SincExpertLinear(weights[name], *(t[name + part] for part in "ABc"), grid=grids[name]) for name in sizes
        )
        options: dict[str, Any] = {"activation": "silu", "scaling": SCALING, "backend": make.backend}
        return moe_sinc_mlp(t["x"], index, t["route"], up, down, **options)

    def plain(t: Leaves) -> Tensor:
        y, rank = torch.zeros_like(t["x"]), size.capacity
        for expert in range(size.experts - 1):
            tokens, choice = (index == expert).nonzero(as_tuple=True)
            rows, own = t["x"][tokens], slice(expert * rank, (expert + 1) * rank)
            for name in sizes:
                factors = (t[f"{name}A"][own], t[f"{name}B"][own], t[f"{name}c"])
                rows = rows @ moved(weights[name][expert], *factors, grids[name], rows.dtype, terms[f"{name}c"]).t()
                rows = glu(rows) if name == "up." else rows
            y = y.index_add(0, tokens, rows * t["route"][tokens, choice, None])
        return y

    terms = {f"{name}c": scores.new_zeros((), dtype=torch.float64) for name in sizes}
    return Problem(leaves, op, plain, terms)


# op -> (how it is made, small size, real sizes). A small one divides no tile.
OPS: dict[str, tuple[Callable[[Maker], Problem], Size, dict[str, Size]]] = {
    "lora_linear": (
        dense,
        Size(139, 72, 40),
        {
            "8B attention": Size(8192, 4096, 4096),
            "8B MLP up": Size(4096, 4096, 14336, capacity=64),
            "ragged, rank 128": Size(8191, 2048, 2056, capacity=128),
        },
    ),
    "lora_linear, no bias": (
        lambda make: dense(make, biased=False),
        Size(131, 72, 40, capacity=5),
        {"1B down": Size(8192, 8192, 2048)},
    ),
    "lora_linear on a base of one's own": (
        lambda make: dense(make, own_base=True),
        Size(133, 72, 40),
        {"8B attention": Size(8192, 4096, 4096, capacity=32)},
    ),
    "lora_linear with dropout": (
        lambda make: dense(make, dropout=0.3),
        Size(133, 72, 40),
        {"1B attention": Size(8192, 2048, 2048)},
    ),
    "grouped_lora_linear": (
        lambda make: grouped(make, transposed=False),
        Size(275, 72, 40, experts=5),
        {
            "OLMoE up": Size(32768, 2048, 2048, experts=64, capacity=64),
            "Qwen3 down": Size(32768, 768, 2048, experts=128),
        },
    ),
    "grouped_lora_linear, transposed": (
        lambda make: grouped(make, transposed=True),
        Size(275, 40, 72, experts=5),
        {"gpt-oss down": Size(16384, 2880, 2880, experts=32)},
    ),
    "moe_lora_mlp": (
        moe,
        Size(133, 40, 36, experts=5, top_k=2),
        {
            "OLMoE": Size(4096, 2048, 1024, experts=64, top_k=8),
            "Qwen3": Size(4096, 2048, 768, experts=128, top_k=8, capacity=64),
            "Mixtral": Size(2048, 4096, 14336, experts=8, top_k=2),
        },
    ),
    "moe_lora_mlp, silu by name": (
        lambda make: moe(make, activation="silu"),
        Size(133, 40, 36, experts=5, top_k=2, hot=True),
        {
            "OLMoE, a hot expert": Size(4096, 2048, 1024, experts=64, top_k=8, hot=True),
            "Qwen3": Size(4096, 2048, 768, experts=128, top_k=8, capacity=64),
            "Mixtral": Size(2048, 4096, 14336, experts=8, top_k=2, capacity=128),
        },
    ),
    "VariableRankLoRAExperts": (
        lambda make: moe(make, module=True),
        Size(133, 40, 36, experts=5, top_k=2),
        {"OLMoE": Size(4096, 2048, 1024, experts=64, top_k=8)},
    ),
    "sinc_lora_linear": (
        sinc,
        Size(133, 72, 40, capacity=5),
        {
            "8B attention": Size(8192, 4096, 4096),
            "1B down, rank 64": Size(4096, 8192, 2048, capacity=64),
        },
    ),
    "moe_sinc_mlp": (
        sinc_moe,
        Size(133, 40, 36, experts=5, top_k=2, capacity=3),
        {"eight of OLMoE's experts": Size(1024, 2048, 1024, experts=8, top_k=2)},
    ),
}


def results(compute: Callable[[Leaves], Tensor], leaves: Leaves, dy: Tensor | None) -> tuple[Leaves, Tensor]:
    """The output and the gradient of each leaf by name, and the output's gradient, drawn if there is none."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    y = compute(leaves)
    if dy is None:
        generator = torch.Generator(y.device).manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}, dy


def widened(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}


def check(name: str, size: Size, dtype: torch.dtype, device: str, backend: str | None) -> None:
    problem = OPS[name][0](Maker(size, dtype, device, backend))
    actual, dy = results(problem.op, problem.leaves, None)
    exact, _ = results(problem.plain, widened(problem.leaves, torch.float64), dy)
    plain, _ = results(problem.plain, widened(problem.leaves, dtype), dy)
    for part, value in actual.items():
        assert torch.isfinite(value).all(), f"{part} is not finite"
        try:
            assert_within_budget(value, exact[part], plain[part], problem.terms.get(part))
        except AssertionError as error:
            raise AssertionError(f"{part}: {error}") from error


def table(real: bool, dtypes: Sequence[torch.dtype]) -> list[Any]:
    return [
        pytest.param(name, size, dtype, id=f"{name}, {where}, {str(dtype).removeprefix('torch.')}")
        for dtype in dtypes
        for name, (_, small, sizes) in OPS.items()
        for where, size in (sizes if real else {"small": small}).items()
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "size", "dtype"), table(True, [torch.bfloat16, torch.float16]))
def test_at_real_sizes(name, size, dtype):
    check(name, size, dtype, "cuda", None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_equal_runs_that_never_wait(name):
    """Two runs have the same bits, and neither waits for the GPU."""
    problem = OPS[name][0](Maker(next(iter(OPS[name][2].values())), torch.bfloat16, "cuda", None))
    first, dy = results(problem.op, problem.leaves, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = results(problem.op, problem.leaves, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert list(bits(tuple(first.values()))) == list(bits(tuple(again.values())))


@pytest.mark.parametrize(("name", "size", "dtype"), table(False, [torch.float32, torch.bfloat16]))
def test_on_a_cpu(name, size, dtype):
    check(name, size, dtype, "cpu", "eager" if name != "VariableRankLoRAExperts" else None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dropout_kernel(dtype):
    """Each element is dropped or scaled, a share of p of them, by a mask of the seed, the row and the column alone."""
    ops = pytest.importorskip("lrlora_ops.kernels.primitives")
    p, x = 0.3, torch.randn(8191, 2050, device="cuda").to(dtype)
    seeds = [torch.tensor(seed, device="cuda") for seed in (5, 6)]
    out, again, other = (ops.dropout(x, seed, p) for seed in (seeds[0], seeds[0], seeds[1]))
    kept = out != 0
    scaled = (x.float() * (1 / (1 - p))).to(dtype)
    assert torch.equal(out[kept], scaled[kept])
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5
    assert torch.equal(out, again)
    assert not torch.equal(kept, other != 0)
    assert torch.equal(ops.dropout(x[:100], seeds[0], p), out[:100])
