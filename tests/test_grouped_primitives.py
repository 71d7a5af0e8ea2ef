"""grouped_gemm, combine and the gather of shrink_gram, in both backends, against plain PyTorch in fp64.

Whatever must not be read is NaN or an index out of range here: rows of x that no index names, rows of no expert, and
the weights and biases of experts without rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests._oracle import Case as RankedCase
from tests._oracle import Inputs, assert_parity, assert_within_budget, bits, expected_expand, expected_shrink_gram
from tests.test_addresses import COLUMNS, FAR, ROWS, far, whole_numbers
from tests.test_primitives import CASES as RANKED_CASES
from tests.test_primitives import EAGER, TRITON, check_all, check_dead_rows, setup, triton_shrink_gram
from tests.test_primitives_contract import DEVICES, OPS

combine_module, gemm_module = (
    importlib.import_module(f"lrlora_ops.kernels.{name}") for name in ("combine", "grouped_gemm")
)

pytestmark = pytest.mark.usefixtures("poison")

UNREADABLE = 2**30
SCALING = 0.75


@dataclass(frozen=True)
class GemmCase:
    """Sizes of one call: dense without ``group_sizes``; gathered from ``tokens`` rows of x if that is given."""

    rows: int
    in_features: int
    out_features: int
    group_sizes: tuple[int, ...] | None = None
    tokens: int | None = None

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate((self.rows,) if self.group_sizes is None else self.group_sizes)]


@dataclass
class GemmInputs:
    """x ``[M, K]``, weight ``[E, N, K]``, bias ``[E, N]`` and who owns which row."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    offsets: list[int]
    group_offsets: Tensor | None
    row_index: Tensor | None

    def routing(self) -> dict[str, Tensor | None]:
        return {"group_offsets": self.group_offsets, "row_index": self.row_index}


def make_gemm(case: GemmCase, dtype: torch.dtype, device: str) -> GemmInputs:
    """Normal inputs whose products are of order one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    offsets, num_experts = case.offsets, len(case.offsets) - 1
    x = normal(case.rows if case.tokens is None else case.tokens, case.in_features)
    unread = torch.ones(x.shape[0], dtype=torch.bool, device=device)
    row_index = None
    if case.tokens is None:
        unread[: offsets[-1]] = False
    else:
        row_index = torch.randint(max(case.tokens, 1), (case.rows,), generator=generator, device=device)
        unread[row_index[: offsets[-1]]] = False
        row_index[offsets[-1] :] = UNREADABLE
    x[unread] = torch.nan
    weight = normal(num_experts, case.out_features, case.in_features) / max(case.in_features, 1) ** 0.5
    bias = normal(num_experts, case.out_features)
    for expert, (first, end) in enumerate(pairwise(offsets)):
        if first == end:
            weight[expert], bias[expert] = torch.nan, torch.nan
    group_offsets = None if case.group_sizes is None else torch.tensor(offsets, dtype=torch.int32, device=device)
    return GemmInputs(x.to(dtype), weight.to(dtype), bias.to(dtype), offsets, group_offsets, row_index)


def expected_gemm(inputs: GemmInputs, biased: bool, dtype: torch.dtype) -> Tensor:
    """``y[i] = W[e_i] x[row_index[i]] + bias[e_i]``, expert by expert in ``dtype``; zero for rows of no expert."""
    num_rows = len(inputs.x) if inputs.row_index is None else len(inputs.row_index)
    y = torch.zeros(num_rows, inputs.weight.shape[1], dtype=dtype, device=inputs.x.device)
    for expert, (first, end) in enumerate(pairwise(inputs.offsets)):
        x = inputs.x[first:end] if inputs.row_index is None else inputs.x[inputs.row_index[first:end]]
        y[first:end] = torch.einsum("mk,nk->mn", x.to(dtype), inputs.weight[expert].to(dtype))
        if biased:
            y[first:end] += inputs.bias[expert].to(dtype)
    return y


def check_gemm(ops, inputs: GemmInputs, transposed: bool, biased: bool) -> None:
    weight = inputs.weight.transpose(1, 2).contiguous() if transposed else inputs.weight
    y = ops.grouped_gemm(inputs.x, weight, inputs.bias if biased else None, transposed, **inputs.routing())
    assert y.dtype == inputs.x.dtype
    assert_parity(y, lambda compute: expected_gemm(inputs, biased, compute), inputs.x.dtype)
    assert not y[inputs.offsets[-1] :].any(), "rows of no expert are not zero"


CASES = {
    "no rows": GemmCase(0, 40, 24, group_sizes=(0, 0)),
    "no tokens": GemmCase(0, 40, 24, group_sizes=(0, 0), tokens=0),
    "all ones": GemmCase(1, 1, 1),  # Triton specialises on 1
    "no tile divides": GemmCase(65, 150, 139),
    "full tiles": GemmCase(128, 128, 128),
    "second row tile of the large kind": GemmCase(131, 20, 24, tokens=40),
    "large tiles of two experts": GemmCase(264, 5, 7, group_sizes=(129, 133), tokens=60),
    "nine row tiles": GemmCase(18, 3, 139, group_sizes=(2,) * 9, tokens=5),  # eight run side by side
    "no features in": GemmCase(3, 0, 5),
    "no features out": GemmCase(3, 5, 0),
    "ragged": GemmCase(72, 40, 24, group_sizes=(7, 0, 64, 1)),  # no rows, a full tile, a single row
    "hot expert": GemmCase(130, 40, 24, group_sizes=(0, 0, 130, 0), tokens=65),
    "rows of no expert": GemmCase(83, 40, 24, group_sizes=(3, 5, 66), tokens=30),
    "tiles of no expert": GemmCase(270, 40, 24, group_sizes=(3, 61, 0)),
    "no expert has rows": GemmCase(70, 40, 24, group_sizes=(0, 0), tokens=9),
    "one expert": GemmCase(70, 40, 24, group_sizes=(66,)),
}
each_backend = pytest.mark.parametrize(
    ("backend", "dtype"), EAGER + TRITON, ids=lambda p: str(p).removeprefix("torch.")
)
either_backend = pytest.mark.parametrize("backend", OPS)


@each_backend
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_grouped_gemm(case, transposed, backend, dtype):
    inputs = make_gemm(case, dtype, DEVICES[backend])
    for biased in (False, True):
        check_gemm(OPS[backend], inputs, transposed, biased)


def check_gemm_with_low_rank(ops, case: RankedCase, ranked: Inputs) -> None:
    """The base product, the bias and the expansion, rounded once."""
    dtype = ranked.x.dtype
    shape = GemmCase(case.rows, case.in_features, case.out_features, case.group_sizes)
    drawn = make_gemm(shape, dtype, ranked.x.device.type)
    inputs = GemmInputs(ranked.x, drawn.weight, drawn.bias, drawn.offsets, ranked.group_offsets, ranked.row_index)
    for gated, biased in ((False, False), (True, True)):

        def expected(compute: torch.dtype, gated: bool = gated, biased: bool = biased) -> Tensor:
            return expected_gemm(inputs, biased, compute) + expected_expand(ranked, None, gated, compute)

        y = ops.grouped_gemm(
            *(inputs.x, inputs.weight, inputs.bias if biased else None, False, inputs.group_offsets, inputs.row_index),
            *(ranked.u, ranked.b, ranked.ranks, SCALING, ranked.gate if gated else None, ranked.components),
        )
        assert y.dtype == dtype
        assert_parity(y, expected, dtype)
        assert not y[inputs.offsets[-1] :].any(), "rows of no expert are not zero"


@each_backend
@pytest.mark.parametrize("case", RANKED_CASES.values(), ids=RANKED_CASES.keys())
def test_grouped_gemm_with_a_low_rank_product(case, backend, dtype):
    ops, inputs = setup(case, backend, dtype)
    check_gemm_with_low_rank(ops, case, inputs)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["ragged", "dense gather", "rows of no expert", "experts of two rank tiles"])
def test_bf16_on_either_kind_of_cpu(name, native, monkeypatch):
    """One that multiplies bf16 itself, and one that is as fast in fp32."""
    monkeypatch.setattr(OPS["eager"], "_MULTIPLIES_BF16", native)
    case = RANKED_CASES[name]
    ops, inputs = setup(case, "eager", torch.bfloat16)
    check_all(ops, inputs, case.max_rank, torch.bfloat16)
    check_gemm_with_low_rank(ops, case, inputs)


@either_backend
def test_grouped_gemm_of_any_layout(backend):
    """Views of x, weight and bias give what contiguous tensors give."""
    inputs = make_gemm(CASES["ragged"], torch.float32, DEVICES[backend])
    args = (inputs.x, inputs.weight, inputs.bias)
    plain = OPS[backend].grouped_gemm(*args, **inputs.routing())
    strange = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in args]
    strange[1] = torch.nn.functional.pad(strange[1], (2, 3))[..., 2:-3]
    torch.testing.assert_close(OPS[backend].grouped_gemm(*strange, **inputs.routing()), plain)


@either_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sums_are_in_fp32(backend, dtype):
    """Half precision would lose each one beside 2048."""
    x = torch.ones(1, 65, dtype=dtype, device=DEVICES[backend])
    x[0, 0] = 2048
    assert OPS[backend].grouped_gemm(x, torch.ones_like(x)[None]).item() == 2048 + 64
    positions = torch.arange(65, device=x.device)[None]
    assert OPS[backend].combine(x.t(), positions).item() == 2048 + 64


def expected_combine(rows: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(len(positions), rows.shape[1], dtype=dtype, device=rows.device)
    for token, position in enumerate(positions.tolist()):
        for k, row in enumerate(position):
            out[token] += rows[row].to(dtype) * (1 if weights is None else weights[token, k].to(dtype))
    return out


@each_backend
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_cols"),
    [
        (0, 8, 24),
        (5, 1, 1),  # Triton specialises on 1
        (5, 1, 0),
        (17, 8, 139),
        (3, 8, 1030),  # a second column tile
        (4, 0, 24),  # nothing to add
    ],
)
def test_combine(num_tokens, top_k, num_cols, weights_dtype, backend, dtype):
    """Rows that no token asks for are not read; some are asked for twice."""
    generator = torch.Generator(DEVICES[backend]).manual_seed(0)
    normal = {"generator": generator, "device": DEVICES[backend]}
    num_rows = max(num_tokens * top_k, 2)
    rows = torch.randn(num_rows, num_cols, **normal).to(dtype)
    positions = torch.randint(num_rows // 2, (num_tokens, top_k), **normal)
    rows[num_rows // 2 :] = torch.nan
    weights = None if weights_dtype is None else torch.randn(num_tokens, top_k, **normal).to(weights_dtype)

    out = OPS[backend].combine(rows, positions, weights)
    assert out.dtype == dtype
    exact = expected_combine(rows, positions, weights, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-13)
    else:
        assert_within_budget(out, exact, expected_combine(rows, positions, weights, torch.float32))


@either_backend
def test_combine_sums_in_the_order_of_k(backend):
    """In fp32, 1e8 + 1 is 1e8: what is left of the one says in which order the rows were added."""
    rows = torch.tensor([[1e8], [1.0], [-1e8]], device=DEVICES[backend])
    positions = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]], device=rows.device)
    ones = torch.ones(positions.shape, device=rows.device)
    for weights in (None, ones):
        assert OPS[backend].combine(rows, positions, weights).flatten().tolist() == [0.0, 1.0, 0.0]


@either_backend
def test_combine_of_any_layout(backend):
    rows, positions, weights = combine_arguments(backend)
    plain = OPS[backend].combine(rows, positions, weights)
    strange = [t.t().contiguous().t() for t in (rows, positions, weights)]
    torch.testing.assert_close(OPS[backend].combine(*strange), plain)
    wide = torch.nn.functional.pad(rows, (3, 4))[:, 3:-4]
    torch.testing.assert_close(OPS[backend].combine(wide, positions, weights), plain)


def combine_arguments(backend: str) -> tuple[Tensor, Tensor, Tensor]:
    normal = {"generator": torch.Generator(DEVICES[backend]).manual_seed(0), "device": DEVICES[backend]}
    return torch.randn(20, 30, **normal), torch.randint(20, (6, 4), **normal), torch.randn(6, 4, **normal)


GATHERED = ["dense gather", "hot expert", "rows of no expert"]
PLANS = [(*parameters, False) for parameters in EAGER + TRITON] + [(*parameters, True) for parameters in TRITON]


def gather_dy(inputs) -> Tensor:
    """Tokens ``[T, N]`` whose gathered rows become ``inputs.dy``; the tokens that no row asks for are NaN."""
    end = inputs.experts[-1][0].stop
    index = inputs.row_index[:end].long()
    tokens = torch.full_like(inputs.dy[: index.max() + 1], torch.nan)
    tokens[index] = inputs.dy[index]
    inputs.dy[:end] = tokens[index]
    return tokens


@pytest.mark.parametrize(("backend", "dtype", "fused"), PLANS, ids=lambda p: str(p).removeprefix("torch."))
@pytest.mark.parametrize("name", GATHERED)
def test_shrink_gram_gathers(name, backend, dtype, fused, monkeypatch):
    """Both plans of the Triton launcher; eager has one."""
    monkeypatch.setattr(triton_shrink_gram, "fuses_gram", lambda *_: fused)
    ops, inputs = setup(RANKED_CASES[name], backend, dtype)
    args = (inputs.b, inputs.u, inputs.ranks, SCALING, inputs.gate)
    v, d_b, c = ops.shrink_gram(gather_dy(inputs), *args, **inputs.table(), row_index=inputs.row_index)
    for index, actual in enumerate((v, d_b, c)):
        assert_parity(actual, lambda compute, index=index: expected_shrink_gram(inputs, True, compute)[index], dtype)
    check_dead_rows(inputs, d_b)
    check_dead_rows(inputs, c)


def calls(backend: str):
    """Arguments of each op, by name."""
    gemm = make_gemm(CASES["rows of no expert"], torch.float16, DEVICES[backend])
    inputs = setup(RANKED_CASES["rows of no expert"], backend, torch.float16)[1]
    table = {**inputs.table(), "row_index": inputs.row_index}
    low_rank = {name: getattr(inputs, name) for name in ("u", "b", "ranks", "gate", "components")}
    return {
        "grouped_gemm": ((gemm.x, gemm.weight, gemm.bias), gemm.routing() | low_rank),
        "combine": (combine_arguments(backend), {}),
        "shrink_gram": ((gather_dy(inputs), inputs.b, inputs.u, inputs.ranks, SCALING, inputs.gate), table),
    }


@either_backend
@pytest.mark.parametrize("name", ["grouped_gemm", "combine", "shrink_gram"])
def test_opcheck(name, backend):
    """Schema, mutation, fake tensors and strides of each custom op, as torch.compile relies on them."""
    args, kwargs = calls(backend)[name]
    torch.library.opcheck(getattr(OPS[backend], name), args, kwargs)


@either_backend
@pytest.mark.parametrize("name", ["grouped_gemm", "combine", "shrink_gram"])
def test_equal_runs(name, backend):
    results = []
    for _ in range(2):
        args, kwargs = calls(backend)[name]
        results.append(list(bits(getattr(OPS[backend], name)(*args, **kwargs))))
    assert results[0] == results[1]


sparse_memory = pytest.mark.skipif(torch.cuda.is_available(), reason="the mapping is host memory, for the interpreter")


@triton.jit
def column_number(acc, first_ptr, offs_m, mask_m, offs_n, mask_n):
    return tl.load(first_ptr) + acc * 0 + offs_n[None, :]


def test_an_epilogue_reads_its_operand_and_leaves_rows_of_no_expert_zero():
    case = GemmCase(30, 20, 139, group_sizes=(9, 0, 17))
    inputs = make_gemm(case, torch.float32, DEVICES["triton"])
    first = torch.full((1,), 5.0, device=inputs.x.device)
    y = gemm_module.launch_gemm(
        inputs.x, inputs.weight, **inputs.routing(), epilogue=column_number, operand=first
    ).cpu()
    assert torch.equal(y[:26], 5 + torch.arange(139.0).expand(26, -1)) and not y[26:].any()


@sparse_memory
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "in_features", "out_features", "strides"),  # strides of expert, in and out
    [(4, COLUMNS, 1, (2**30, 1, 2**30)), (1, 4, COLUMNS, (0, 2**30, 1)), (1, COLUMNS, 4, (0, 1, 2**30))],
    ids=["far expert", "far input", "far output"],
)
def test_grouped_gemm_addresses(num_experts, in_features, out_features, strides, gather):
    """Rows and weights past 2^31 elements, in the last expert; whole numbers make the sums exact."""
    weight, weight_rows = far(whole_numbers(4, COLUMNS), 0, 2**30)
    (x, x_rows), (y, y_rows) = far(whole_numbers(ROWS, COLUMNS)), far(torch.full((ROWS, out_features), torch.nan))
    index, _ = far(torch.arange(FAR, FAR + ROWS, dtype=torch.int32)[:, None])
    gemm_module.grouped_gemm_kernel[(-(-out_features // 16),)](
        x_ptr=x, weight_ptr=weight, bias_ptr=None, y_ptr=y, row_index_ptr=index,
        group_offsets_ptr=torch.tensor([FAR] * num_experts + [FAR + ROWS], dtype=torch.int32), num_rows=FAR + ROWS,
        in_features=in_features, out_features=out_features, num_experts=num_experts, stride_xm=COLUMNS,
        stride_we=strides[0], stride_wk=strides[1], stride_wn=strides[2], HAS_BIAS=False, GROUPED=True,
        HAS_INDEX=gather, PRECISION="ieee", GROUP_M=8, BLOCK_E=num_experts, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16,
        u_ptr=None, b_ptr=None, gate_ptr=None, ranks_ptr=None, components_ptr=None, max_rank=0, scaling=1.0,
        HAS_LOW_RANK=False, HAS_GATE=False, HAS_TABLE=False, WIDTH=16, BLOCK_R=16,
    )  # fmt: skip
    last = {4: weight_rows[3:].t(), 1: weight_rows if in_features == 4 else weight_rows.t()}[num_experts]
    assert torch.equal(y_rows, x_rows[:, :in_features].float() @ last.float())


@sparse_memory
def test_combine_addresses():
    stride = 2**30
    (rows, row_values), (out, out_rows) = (far(whole_numbers(ROWS, 32), 0, stride) for _ in range(2))
    positions = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 3]])
    combine_module.combine_kernel[(ROWS, 1)](
        rows_ptr=rows, positions_ptr=positions, weights_ptr=None, end_ptr=None, out_ptr=out, num_cols=stride,
        stride_rm=stride, TOP_K=2, HAS_WEIGHTS=False, HAS_END=False, BLOCK_N=32,
    )  # fmt: skip
    assert torch.equal(out_rows, row_values[positions].sum(1))
