"""sinc_lora_linear: its output and every gradient of both backends against the fp64 oracle, and inside PyTorch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrlora_ops import sinc_lora_linear
from lrlora_ops.reference import sinc_lora_linear_reference
from tests._oracle import assert_within_budget, bits
from tests.test_lora_linear import BACKENDS, DEVICE, SCALING, each_backend, each_dtype
from tests.test_lora_linear_autograd import saved_for_backward

LEAVES = ("x", "lora_A", "lora_B", "coefficients")

pytestmark = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Case:
    """Sizes of a call; ``spread`` is how far the elements of ``B^T A`` go, in grid steps."""

    leading: tuple[int, ...]
    in_features: int
    out_features: int
    rank: int
    num_coefficients: int = 3
    spread: float = 1.5
    bias: bool = False


def operands(case: Case, dtype: torch.dtype = torch.float32, backend: str = "eager", adapter=None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE[backend], dtype)

    sums = torch.promote_types(dtype, torch.float32)
    given = {
        "x": normal(*case.leading, case.in_features),
        "lora_A": normal(case.rank, case.in_features, dtype=adapter or dtype) / max(case.rank, 1) ** 0.5,
        "lora_B": case.spread * normal(case.rank, case.out_features, dtype=adapter or dtype),
        "coefficients": normal(case.num_coefficients, dtype=sums),
    }
    given = {name: t.detach().requires_grad_() for name, t in given.items()}
    given["weight"] = normal(case.out_features, case.in_features)
    return given | ({"bias": normal(case.out_features)} if case.bias else {})


def plain(given: dict[str, Tensor], grid: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients by plain PyTorch in ``dtype``: W and the update are added in fp32, and rounded once."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in LEAVES}
    sums = torch.promote_types(dtype, torch.float32)
    z = leaves["lora_B"].t() @ leaves["lora_A"]
    phi, reach = z.to(sums), len(leaves["coefficients"]) // 2
    for k in range(-reach, reach + 1):
        phi = phi + leaves["coefficients"][k + reach].to(sums) * (torch.sinc(z.to(sums) / grid - k) - float(k == 0))
    weight = (given["weight"].to(sums) + SCALING * phi).to(dtype)
    y = F.linear(leaves["x"], weight, given["bias"].to(dtype) if "bias" in given else None)
    return results(y, leaves)


def oracle(given: dict[str, Tensor], grid: float) -> dict[str, Tensor]:
    leaves = {name: given[name].detach().double().requires_grad_() for name in LEAVES}
    frozen = {name: t for name, t in given.items() if name not in LEAVES}
    return results(sinc_lora_linear_reference(**leaves, **frozen, grid=grid, scaling=SCALING), leaves)


def results(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, [leaves[name] for name in LEAVES], dy.half().to(y), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(LEAVES, grads, strict=True))}


CASES = {
    "odd sizes": Case((5,), 33, 70, 3, bias=True),
    "one component": Case((2, 3), 17, 20, 1, num_coefficients=1),
    "nine functions, elements beyond them": Case((4,), 40, 24, 6, num_coefficients=9, spread=6.0),
    "nine functions, elements among them": Case((4,), 40, 24, 6, num_coefficients=9, spread=0.6),
    "components of two rank tiles": Case((3,), 20, 16, 40, num_coefficients=9, spread=0.6),
    "far beyond them": Case((4,), 16, 16, 2, spread=1e4),
    "rank 0": Case((3,), 20, 16, 0),
}


@pytest.mark.parametrize("dtype", BACKENDS["eager"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_eager_parity(case, dtype):
    check_parity(operands(case, dtype), 0.7, dtype, "eager")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("odd sizes", torch.float32),
        ("nine functions, elements beyond them", torch.float16),
        ("nine functions, elements among them", torch.float32),
        ("nine functions, elements among them", torch.float16),
        ("components of two rank tiles", torch.float32),
        ("rank 0", torch.float32),
    ],
)
def test_triton_parity(case, dtype):
    check_parity(operands(CASES[case], dtype, "triton"), 0.7, dtype, "triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_adapters_in_fp32_beside_fp16(backend):
    given = operands(Case((3,), 20, 12, 2), torch.float16, backend, adapter=torch.float32)
    check_parity(given, 0.7, torch.float16, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 32, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.6, 1.5], ids=["near", "afar"])
def test_parity_and_equal_runs_on_a_gpu(spread, dtype, rank):
    given = operands(Case((600,), 1040, 776, rank, num_coefficients=9, spread=spread, bias=True), dtype, "triton")
    check_parity(given, 0.7, dtype, "triton")
    first, second = (
        results(sinc_lora_linear(**given, grid=0.7, scaling=SCALING, backend="triton"), given) for _ in range(2)
    )
    assert [list(bits(t)) for t in first.values()] == [list(bits(t)) for t in second.values()]


def check_parity(given: dict[str, Tensor], grid: float, dtype: torch.dtype, backend: str) -> None:
    y = sinc_lora_linear(**given, grid=grid, scaling=SCALING, backend=backend)
    assert y.dtype == dtype
    actual, exact = results(y, given), oracle(given, grid)
    simple = plain(given, grid, dtype)
    for name, value in actual.items():
        assert value.dtype == (given[name].dtype if name in LEAVES else dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-10)
        else:
            assert_within_budget(value.cpu(), exact[name].cpu(), simple[name].cpu())


@pytest.mark.parametrize("elements", [1, 500 * (3 + 9)], ids=["tiles of a row", "tiles of several rows"])
@pytest.mark.parametrize(("out_features", "in_features"), [(130, 70), (64, 71)])
def test_parity_of_several_blocks(out_features, in_features, elements, monkeypatch):
    """Of the eager backend: blocks of rows of the weight, and tiles of a block, the last ones smaller."""
    monkeypatch.setattr("lrlora_ops._sinc._ELEMENTS", elements)
    monkeypatch.setattr("lrlora_ops._sinc_gemm._BLOCK_ELEMENTS", 1)
    given = operands(Case((3,), in_features, out_features, 2))
    check_parity(given, 0.7, torch.float32, "eager")


@pytest.mark.parametrize(("rank", "span"), [(2, 512), (20, 16)], ids=["one span", "spans of one tile, two rank tiles"])
def test_parity_of_several_tiles(rank, span, monkeypatch):
    """Of the kernels, along each side."""
    module = importlib.import_module("lrlora_ops.kernels.sinc")
    tile = importlib.import_module("lrlora_ops.kernels._configs").Tile(16, 16, 16, 4, 1)
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    monkeypatch.setattr(module, "_SPAN", span)
    given = operands(Case((3,), 40, 24, rank), torch.float32, "triton")
    check_parity(given, 0.7, torch.float32, "triton")


# w = z / h at, near and between the centres, within and beyond the grid of k from -2 to 2.
POINTS = [float(k) for k in range(-4, 5)] + [0.5, -1.5, 2.5]
POINTS += [k + sign * d for k in (-2, 0, 1, 3) for sign in (-1, 1) for d in (1e-12, 1e-7, 1e-4, 1e-2)]


def at_points(points: list[float], grid: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rank 1, with ``B^T A`` equal to the points, one a row."""
    generator = torch.Generator().manual_seed(0)
    z = torch.tensor(points, dtype=torch.float64) * grid
    given = {
        "x": torch.randn(2, 1, generator=generator, dtype=torch.float64),
        "lora_A": torch.ones(1, 1, dtype=torch.float64),
        "lora_B": z[None],
        "coefficients": torch.randn(5, generator=generator, dtype=torch.float64),
    }
    given = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
    return given | {"weight": torch.randn(len(points), 1, generator=generator, dtype=torch.float64).to(dtype)}


@pytest.mark.parametrize("grid", [1.0, 0.37])
def test_gradcheck_at_and_near_the_centres(grid):
    """With grid 1 the points are the centres to the bit."""
    given = at_points(POINTS, grid)
    frozen = given.pop("weight")

    def function(*leaves: Tensor) -> Tensor:
        return sinc_lora_linear(**dict(zip(given, leaves, strict=True)), weight=frozen, grid=grid, scaling=SCALING)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@each_backend
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_value_and_slope_near_the_centres_in_fp32(scale, backend):
    """Against fp64 at the very points that fp32 has; torch.sinc's own slope loses digits near its centre."""
    grid = 0.5 * scale
    given = at_points(POINTS, grid, torch.float32)
    given = {n: t.detach().to(DEVICE[backend]).requires_grad_(t.requires_grad) for n, t in given.items()}
    given["coefficients"] = (given["coefficients"].detach() * scale).requires_grad_()
    actual = results(sinc_lora_linear(**given, grid=grid, scaling=SCALING, backend=backend), given)
    exact = oracle(given, grid)
    for name in ("y", "lora_B", "coefficients"):
        largest = exact[name].abs().max()
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=0, atol=float(4e-6 * largest))


@each_dtype
def test_large_elements(dtype, backend):
    """Far from all centres phi is a line: value and gradients stay finite and right."""
    points = [1e3, -1e4, 2.0**23, 2.0**24 + 2, -1e9, 1e15]
    given = at_points(points if dtype != torch.float16 else [1e3, -1e4], 1.0, dtype)
    given["coefficients"] = (
        given["coefficients"].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    )
    given = {n: t.detach().to(DEVICE[backend]).requires_grad_(t.requires_grad) for n, t in given.items()}
    actual = results(sinc_lora_linear(**given, grid=1.0, scaling=SCALING, backend=backend), given)
    exact = oracle(given, 1.0)
    tolerance = max(16 * torch.finfo(dtype).eps, 1e-9)
    for name in ("y", "x", "lora_B", "coefficients"):
        assert actual[name].isfinite().all()
        largest = float(exact[name].abs().max())
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=tolerance, atol=tolerance * largest)


@each_backend
def test_it_starts_as_lora_and_no_gradient_is_noise(backend):
    """With B = 0 the output is the layer's to the bit, and the coefficients, which do nothing yet, get next to none."""
    given = operands(Case((5,), 33, 20, 3), backend=backend)
    given["lora_B"] = torch.zeros_like(given["lora_B"]).requires_grad_()
    given["coefficients"] = torch.zeros_like(given["coefficients"]).requires_grad_()
    y = sinc_lora_linear(**given, grid=0.1, scaling=SCALING, backend=backend)
    assert torch.equal(y, given["x"] @ given["weight"].t())
    gradients = results(y, given)
    assert gradients["lora_B"].any()
    assert gradients["coefficients"].abs().max() < 1e-12 * gradients["lora_B"].abs().max()


@pytest.mark.parametrize("needed", [("x",), ("lora_A",), ("coefficients",), ("x", "lora_B")], ids=" and ".join)
def test_only_what_is_needed(needed):
    given = operands(Case((3,), 20, 12, 2))
    everything = results(sinc_lora_linear(**given, grid=0.7, scaling=SCALING), given)
    part = {name: t.detach().requires_grad_(name in needed) for name, t in given.items()}
    y = sinc_lora_linear(**part, grid=0.7, scaling=SCALING)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().float()
    y.backward(dy)
    for name in LEAVES:
        assert (part[name].grad is not None) == (name in needed)
        if name in needed:
            torch.testing.assert_close(part[name].grad, everything[name], rtol=1e-5, atol=1e-6)


def test_equal_runs():
    case = Case((3,), 70, 20, 2)
    first, second = (
        results(sinc_lora_linear(**given, grid=0.7, scaling=SCALING), given)
        for given in (operands(case) for _ in range(2))
    )
    assert [list(bits(t)) for t in first.values()] == [list(bits(t)) for t in second.values()]


def test_keeps_x_and_the_parameters_alone():
    given = operands(Case((64,), 96, 80, 4, num_coefficients=9))
    saved = saved_for_backward(lambda: sinc_lora_linear(**given, grid=0.7, scaling=SCALING))
    assert sorted(tuple(t.shape) for t in saved) == sorted([(64, 96), (1, 80, 96), (4, 96), (4, 80), (9,)])


def test_autocast_casts_like_linear():
    given = operands(Case((3,), 20, 12, 2, bias=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = sinc_lora_linear(**given, grid=0.7, scaling=SCALING)
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(given[name].grad.dtype == torch.float32 for name in LEAVES)
    cast = {n: t.detach().bfloat16() if n in ("x", "weight", "bias") else t.detach() for n, t in given.items()}
    assert torch.equal(y, sinc_lora_linear(**cast, grid=0.7, scaling=SCALING))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant):
    given = operands(Case((3,), 20, 12, 2))

    def forward(x: Tensor) -> Tensor:
        return sinc_lora_linear(**given | {"x": x}, grid=0.7, scaling=SCALING).tanh()

    expected = results(forward(given["x"]), given)
    y = checkpoint(forward, given["x"], use_reentrant=use_reentrant)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().float()
    y.backward(dy)
    assert all(torch.equal(given[name].grad, expected[name]) for name in LEAVES)


def test_differentiating_twice_is_an_error_that_says_what_to_do():
    given = operands(Case((3,), 20, 12, 2))
    y = sinc_lora_linear(**given, grid=0.7, scaling=SCALING)
    (d_x,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"sinc_lora_linear or moe_sinc_mlp was differentiated twice.*backend='reference'"
    ):
        torch.autograd.grad(d_x.square().sum(), given["lora_A"])


def test_the_reference_backend_differentiates_twice():
    given = operands(Case((2,), 3, 4, 2), torch.float64)
    frozen = given.pop("weight")

    def function(*leaves: Tensor) -> Tensor:
        named = dict(zip(LEAVES, leaves, strict=True))
        return sinc_lora_linear(**named, weight=frozen, grid=0.7, scaling=SCALING, backend="reference")

    assert torch.autograd.gradgradcheck(function, tuple(given[name] for name in LEAVES))


@each_backend
def test_compiles_without_a_break(backend):
    given = operands(Case((3,), 20, 12, 2), backend=backend)

    def function(x: Tensor) -> Tensor:
        return sinc_lora_linear(**given | {"x": x}, grid=0.7, scaling=SCALING, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (results(f(given["x"]), given) for f in (function, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@each_backend
def test_opcheck(backend):
    """Schema, mutation, fake tensors and strides of the custom ops, as torch.compile relies on them."""
    modules = {"eager": "lrlora_ops.eager", "triton": "lrlora_ops.kernels.primitives"}
    ops = importlib.import_module(modules[backend])
    given = {name: t.detach() for name, t in operands(Case((3,), 20, 12, 2), backend=backend).items()}
    moved_by = (
        given["lora_A"],
        given["lora_B"].t().contiguous().t(),
        given["coefficients"],
        0.7,
        SCALING,
        torch.float32,
    )
    x, weight = given["x"], given["weight"][None]
    torch.library.opcheck(ops.sinc_gemm, (x, weight, None, False, None, None, *moved_by))
    rows = (torch.randn(3, 12, device=x.device), x, weight, False, None, None, None, None)
    torch.library.opcheck(ops.sinc_gemm_backward, (*rows, *moved_by, True, True))


def test_triton_refuses_fp64():
    given = operands(Case((3,), 20, 12, 2), torch.float64)
    with pytest.raises(ValueError, match=r"torch.float64, and backend 'triton' accumulates in fp32"):
        sinc_lora_linear(**given, grid=0.7, scaling=1.0, backend="triton")


def test_no_rows_and_no_outputs():
    for case in (Case((0,), 20, 12, 2), Case((3,), 20, 0, 2)):
        given = operands(case)
        gradients = results(sinc_lora_linear(**given, grid=0.7, scaling=SCALING), given)
        assert all(not gradients[name].any() for name in LEAVES)
