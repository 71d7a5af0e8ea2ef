"""moe_sinc_mlp: experts with moved weights, output and every gradient against an oracle that goes token by token."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrlora_ops import SincExpertLinear, moe_sinc_mlp
from lrlora_ops.reference import moe_lora_mlp_reference, sinc_lora_linear_reference
from tests._oracle import bits
from tests.test_lora_linear import BACKENDS, DEVICE, SCALING, each_backend
from tests.test_lora_linear_autograd import saved_for_backward
from tests.test_moe_lora_mlp import clamped, rms_norm, swiglu

pytestmark = pytest.mark.usefixtures("poison")

EXPERTS, HIDDEN, INNER, GRID = 4, 20, 12, {"up": 0.7, "down": 0.4}
LEAVES = ("x", "weights", "up_A", "up_B", "up_c", "down_A", "down_B", "down_c")


@dataclass(frozen=True)
class Case:
    """What a layer can have; ``chosen`` are the experts of each token, and E drops a pair."""

    chosen: tuple[tuple[int, ...], ...]
    rank: int = 3
    activation: Callable[[Tensor], Tensor] | str = swiglu
    post: Callable[[Tensor], Tensor] | None = None
    biased: bool = False
    transposed: bool = False


MIXED = ((0, 1), (3, 0), (1, 3), (0, 3), (3, 1))  # expert 2 sees no row
CASES = {
    "an expert without rows": Case(MIXED),
    "as gpt-oss": Case(MIXED, activation=clamped, biased=True, transposed=True),
    "one hot expert, one component": Case(((2,),) * 9, rank=1),
    "dropped, the last expert too": Case(((0, 4), (4, 4), (1, 0)), biased=True),
    "transposed, a norm after": Case(((0, 4), (2, 1)), post=rms_norm, transposed=True, activation="silu"),
    "all experts, one token": Case(((0, 1, 2, 3),), rank=18),
}


@dataclass
class Layer:
    case: Case
    index: Tensor
    leaves: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)


def layer(case: Case, dtype: torch.dtype = torch.float32, backend: str = "eager", adapter=None) -> Layer:
    """Whose values fp16 has. Weights of dropped pairs, and the frozen weights of experts without rows, are NaN."""
    generator, device = torch.Generator().manual_seed(0), DEVICE[backend]

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return ((size * torch.randn(*shape, generator=generator) * 64).round() / 64).to(device, dtype)

    top_k = len(case.chosen[0]) if case.chosen else 2
    index = torch.tensor(case.chosen, dtype=torch.int64).view(-1, top_k)
    sums, pool = torch.promote_types(dtype, torch.float32), EXPERTS * case.rank
    leaves = {"x": normal(len(index), HIDDEN), "weights": normal(len(index), top_k)}
    leaves["weights"][(index == EXPERTS).to(device)] = torch.nan
    frozen = {}
    for name, (k, n) in {"up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}.items():
        leaves[f"{name}_A"] = normal(pool, k, size=0.5, dtype=adapter or dtype)
        leaves[f"{name}_B"] = normal(pool, n, size=0.6, dtype=adapter or dtype)
        leaves[f"{name}_c"] = normal(5, size=0.4, dtype=sums)
        frozen[name] = normal(EXPERTS, *((k, n) if case.transposed else (n, k)), size=0.3)
        frozen[name][sorted(set(range(EXPERTS)) - set(index.flatten().tolist()))] = torch.nan
        if case.biased:
            frozen[f"{name}_bias"] = normal(EXPERTS, n)
    return Layer(case, index.to(device), {n: t.requires_grad_() for n, t in leaves.items()}, frozen)


def run(given: Layer, leaves: dict[str, Tensor] | None = None, **options) -> Tensor:
    leaves, case = leaves or given.leaves, given.case
    up, down = (
        SincExpertLinear(
            given.frozen[name],
            *(leaves[f"{name}_{letter}"] for letter in "ABc"),
            grid=GRID[name],
            bias=given.frozen.get(f"{name}_bias"),
            transposed=case.transposed,
        )
        for name in ("up", "down")
    )
    around = {"activation": case.activation, "post": case.post, "scaling": SCALING}
    return moe_sinc_mlp(leaves["x"], given.index, leaves["weights"], up, down, **around, **options)


def plain_weight(weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
    """By plain PyTorch: factors in ``dtype``, the sum in fp32, rounded once."""
    z = b.to(dtype).float().t() @ a.to(dtype).float()
    phi, reach = z, len(c) // 2
    for k in range(-reach, reach + 1):
        phi = phi + c[k + reach] * (torch.sinc(z / grid - k) - float(k == 0))
    return (weight.float() + SCALING * phi).to(dtype)


def oracle(given: Layer, dtype: torch.dtype = torch.float64) -> Tensor:
    """By the leaves themselves. In half precision the sum of weight and update is rounded to it, and so are rows."""
    leaves, case = given.leaves, given.case

    def projection(name: str) -> Callable[[Tensor, int], Tensor]:
        def project(rows: Tensor, expert: int) -> Tensor:
            own = slice(expert * case.rank, (expert + 1) * case.rank)
            weight = given.frozen[name][expert]
            bias = given.frozen.get(f"{name}_bias")
            pools = [leaves[f"{name}_A"][own], leaves[f"{name}_B"][own], leaves[f"{name}_c"]]
            weight = weight.t() if case.transposed else weight
            bias = None if bias is None else bias[expert]
            if dtype != torch.float64:
                return F.linear(rows.to(dtype), plain_weight(weight, *pools, GRID[name], dtype), bias)
            return sinc_lora_linear_reference(rows, weight, *pools, grid=GRID[name], scaling=SCALING, bias=bias)

        return project

    activation = swiglu if case.activation == "silu" else case.activation
    projections = (projection("up"), projection("down"))
    if case.post is not None:
        projections = (projections[0], lambda rows, expert: case.post(projection("down")(rows, expert)))
    x, weights = leaves["x"].to(dtype), leaves["weights"].to(dtype)
    return moe_lora_mlp_reference(x, given.index, weights, projections, activation, EXPERTS)


def results(y: Tensor, given: Layer) -> dict[str, Tensor]:
    """The output and every gradient; that of a dropped pair's weight is 0."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().to(y)
    leaves = [given.leaves[name] for name in LEAVES]
    grads = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(LEAVES, grads, strict=True))}


def check_parity(given: Layer, dtype: torch.dtype, backend: str) -> None:
    """In half and single precision within twice plain PyTorch's largest error, each relative to the largest value: a
    bound for each result alone would be luck where that is five numbers. Formulas are checked in fp64."""
    y = run(given, backend=backend)
    assert y.dtype == dtype
    actual, exact = results(y, given), results(oracle(given), given)
    for name, value in actual.items():
        assert value.dtype == (dtype if name == "y" else given.leaves[name].dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-10)
    if dtype != torch.float64:
        plain = relative_errors(results(oracle(given, dtype), given), exact)
        budget = 2 * max(plain.values()) + torch.finfo(dtype).eps
        errors = relative_errors(actual, exact)
        assert all(error <= budget for error in errors.values()), (budget, errors)


def relative_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each, by the largest value."""
    return {
        name: float((actual[name].double() - value).abs().max() / value.abs().max()) for name, value in exact.items()
    }


@pytest.mark.parametrize("dtype", BACKENDS["eager"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_eager_parity(case, dtype):
    check_parity(layer(case, dtype), dtype, "eager")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("an expert without rows", torch.float32),
        ("as gpt-oss", torch.float16),
        ("dropped, the last expert too", torch.float32),
        ("transposed, a norm after", torch.float32),
    ],
)
def test_triton_parity(case, dtype):
    check_parity(layer(CASES[case], dtype, "triton", torch.float32), dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parity_on_a_gpu(case, dtype):
    check_parity(layer(case, dtype, "triton", torch.float32), dtype, "triton")


def test_parity_of_several_tiles_of_experts(monkeypatch):
    """Of the kernels, along each side: two rank tiles, spans of one tile."""
    module = importlib.import_module("lrlora_ops.kernels.sinc")
    tile = importlib.import_module("lrlora_ops.kernels._configs").Tile(16, 16, 16, 4, 1)
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    monkeypatch.setattr(module, "_SPAN", 16)
    check_parity(layer(Case(MIXED, rank=18), torch.float32, "triton"), torch.float32, "triton")


def test_parity_of_several_blocks_of_experts(monkeypatch):
    monkeypatch.setattr("lrlora_ops._sinc_gemm._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("lrlora_ops._sinc_gemm._BLOCK_ROWS", 7)
    check_parity(layer(CASES["as gpt-oss"], torch.float64), torch.float64, "eager")


def test_gradcheck():
    given = layer(Case(((0, 4), (3, 0)), rank=2, biased=True), torch.float64)
    given.leaves["weights"] = torch.rand(2, 2, dtype=torch.float64).requires_grad_()  # finite differences of NaN
    leaves = tuple(given.leaves[name] for name in LEAVES)
    assert torch.autograd.gradcheck(lambda *own: run(given, dict(zip(LEAVES, own, strict=True))), leaves)


ALL_NEEDED = [("x",), ("weights",), ("up_A",), ("down_c",), ("up_c", "down_B")]


@pytest.mark.parametrize(("needed", "backend"), [*((own, "eager") for own in ALL_NEEDED), (ALL_NEEDED[-1], "triton")])
def test_only_what_is_needed(needed, backend):
    given = layer(CASES["an expert without rows"], backend=backend)
    everything = results(run(given, backend=backend), given)
    part = {name: t.detach().requires_grad_(name in needed) for name, t in given.leaves.items()}
    y = run(given, part, backend=backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().to(y))
    for name in LEAVES:
        assert (part[name].grad is not None) == (name in needed)
        if name in needed:
            largest = float(everything[name].abs().max())
            torch.testing.assert_close(part[name].grad, everything[name], rtol=1e-5, atol=1e-6 * largest)


@each_backend
def test_no_tokens(backend):
    given = layer(Case((), biased=True), backend=backend)
    gradients = results(run(given, backend=backend), given)
    assert gradients["y"].shape == (0, HIDDEN)
    assert all(gradients[name].shape == leaf.shape and not gradients[name].any() for name, leaf in given.leaves.items())


@each_backend
def test_equal_runs(backend):
    """An expert without rows leaves no garbage behind: what is not written is NaN here, and read it would show."""
    case = CASES["an expert without rows"]
    first, second = (
        results(run(given, backend=backend), given) for given in (layer(case, backend=backend) for _ in range(2))
    )
    assert [list(bits(t)) for t in first.values()] == [list(bits(t)) for t in second.values()]
    idle = slice(2 * case.rank, 3 * case.rank)
    assert not any(first[f"{name}_{letter}"][idle].any() for name in ("up", "down") for letter in "AB")
    assert all(first[name].isfinite().all() for name in LEAVES)


def test_keeps_nothing_of_the_weights_size():
    """But the weights themselves: x, the rows before both projections, and what the activation keeps."""
    given = layer(Case(((0, 1), (2, 3))))
    saved = saved_for_backward(lambda: run(given))
    own = {t.data_ptr() for t in (*given.frozen.values(), *given.leaves.values())}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert extra and max(t.numel() for t in extra) <= 4 * 2 * INNER  # [gate, up] of the four rows


def test_eager_backend_makes_one_expert_s_weight_at_a_time():
    """The largest tensor that it allocates is an expert's matrix, or the buffers for it: 3 of coefficients, 9 more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(tensor) and not func.is_view:
                    largest = max(largest, tensor.numel())
            return out

    experts, hidden, inner = 64, 128, 128
    frozen = {"up": torch.randn(experts, inner, hidden), "down": torch.randn(experts, hidden, inner)}
    up, down = (
        SincExpertLinear(
            frozen[name],
            *(torch.randn(experts, 128).requires_grad_() for _ in "AB"),
            coefficients=torch.zeros(3).requires_grad_(),
            grid=0.1,
        )
        for name in ("up", "down")
    )
    index = torch.arange(experts)[:, None]
    with Watch():
        x = torch.randn(experts, hidden, requires_grad=True)
        moe_sinc_mlp(x, index, torch.ones(experts, 1), up, down, activation=torch.tanh).sum().backward()
    assert hidden * inner <= largest <= 12 * hidden * inner < experts * hidden * inner


def test_checkpointing_changes_no_bit():
    given = layer(CASES["as gpt-oss"])

    def forward(x: Tensor) -> Tensor:
        return run(given, {**given.leaves, "x": x}).tanh()

    plain = results(forward(given.leaves["x"]), given)
    again = checkpoint(forward, given.leaves["x"], use_reentrant=False)
    again.backward(torch.randn(again.shape, generator=torch.Generator().manual_seed(1)).half().to(again))
    assert all(torch.equal(given.leaves[name].grad, plain[name]) for name in LEAVES)


@each_backend
def test_compiles_without_a_break(backend):
    given = layer(CASES["an expert without rows"], backend=backend)

    def function(x: Tensor) -> Tensor:
        return run(given, {**given.leaves, "x": x}, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (results(f(given.leaves["x"]), given) for f in (function, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@each_backend
def test_opcheck(backend):
    """Schema, aliasing, fake tensors and strides of the custom ops, as torch.compile relies on them."""
    ops = importlib.import_module({"eager": "lrlora_ops.eager", "triton": "lrlora_ops.kernels.primitives"}[backend])
    given = layer(Case(MIXED), backend=backend)
    low_rank = [given.leaves[f"up_{letter}"].detach() for letter in "ABc"]
    moved_by = (*low_rank, 0.7, SCALING, torch.float32)
    x, weight = given.leaves["x"].detach(), given.frozen["up"].nan_to_num()
    offsets = torch.tensor([0, 2, 3, 3, 5], dtype=torch.int32, device=x.device)
    rows = torch.arange(5, device=x.device)
    torch.library.opcheck(ops.sinc_gemm, (x, weight, None, False, offsets, rows, *moved_by))
    dy = torch.randn(5, 2 * INNER, device=x.device)
    needs = (True, True)
    torch.library.opcheck(ops.sinc_gemm_backward, (dy, x, weight, False, offsets, None, rows, None, *moved_by, *needs))


def wrong(**changes: object) -> None:
    given = layer(Case(MIXED))
    good = {
        "weight": given.frozen["up"],
        "lora_A": given.leaves["up_A"],
        "lora_B": given.leaves["up_B"],
        "coefficients": given.leaves["up_c"],
        "grid": 0.5,
    }
    down = SincExpertLinear(given.frozen["down"], *(given.leaves[f"down_{x}"] for x in "ABc"), grid=0.5)
    options = {"activation": swiglu, **{key: changes.pop(key) for key in ("activation", "backend") if key in changes}}
    moe_sinc_mlp(
        given.leaves["x"], given.index, given.leaves["weights"], SincExpertLinear(**good | changes), down, **options
    )


REFUSED = {
    "weight": ({"weight": torch.zeros(4, 24, 19)}, r"weight has shape \(4, 24, 19\); it must be \(4, 24, 20\)"),
    "layout": ({"transposed": True}, r"weight has shape \(4, 24, 20\); it must be \(4, 20, 24\)"),
    "trained": ({"weight": torch.zeros(4, 24, 20, requires_grad=True)}, "weight requires a gradient"),
    "bias": ({"bias": torch.zeros(24)}, r"bias has shape \(24,\); it must be \(4, 24\)"),
    "uneven": (
        {"lora_A": torch.zeros(13, 20), "lora_B": torch.zeros(13, 24)},
        "lora_A has 13 rows for 4 experts; it must have as many for each",
    ),
    "coefficients": ({"coefficients": torch.zeros(4)}, "one for each k from -n to n"),
    "grid": ({"grid": 0.0}, "grid is 0.0; it must be a finite number above 0"),
    "activation": ({"activation": "relu"}, "activation is 'relu'; it must be a function, or one of"),
    "backend": ({"backend": "reference"}, "experts have the backends 'triton' and 'eager'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**dict(changes))
