"""moe_lora_mlp: a whole layer of experts against an oracle that goes token by token, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrlora_ops import ExpertLinear, RankTable, moe_lora_mlp
from lrlora_ops import eager as eager_primitives
from lrlora_ops.reference import lora_linear_reference, moe_lora_mlp_reference
from tests.test_grouped_lora_linear import make_table
from tests.test_lora_linear import DEVICE, SCALING
from tests.test_lora_linear_compile import Compiled

pytestmark = pytest.mark.usefixtures("poison")


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def clamped(x: Tensor) -> Tensor:
    """gpt-oss': interleaved, and clamped."""
    gate, up = x[..., ::2].clamp(max=1.0), x[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Case:
    """What a layer can have; ``dropped`` sends some pairs to no expert."""

    tokens: int = 13
    top_k: int = 2
    ranks: tuple[int, ...] = (3, 0, 6, 2)
    activation: Callable[[Tensor], Tensor] | str = swiglu
    post: Callable[[Tensor], Tensor] | None = None
    biased: bool = False
    transposed: bool = False
    gated: bool = True
    dropped: bool = False
    hot: bool = False


CASES = {
    "swiglu": Case(),
    "transposed, biases, clamped": Case(activation=clamped, biased=True, transposed=True),
    "no gate": Case(activation=lambda x: F.relu(x).square(), gated=False),
    "post": Case(post=rms_norm, biased=True),
    "dropped": Case(dropped=True, biased=True),
    "post and dropped": Case(post=rms_norm, dropped=True),
    "hot expert": Case(tokens=40, top_k=1, hot=True),
    "no expert twice, all of them": Case(top_k=4),
    "rank 0 of all": Case(ranks=(0, 0, 0, 0), biased=True),
    "one token": Case(tokens=1),
    "silu by name": Case(activation="silu"),
    "gelu by name, transposed and dropped": Case(activation="gelu_tanh", transposed=True, dropped=True),
    "silu by name, biases": Case(activation="silu", biased=True),
    "no tokens": Case(tokens=0),
}
HIDDEN, INNER = 16, 8
LEAVES = ("x", "weights", "up_A", "up_B", "up_gate", "down_A", "down_B", "down_gate")


@dataclass
class Layer:
    """Operands; what is dead is NaN."""

    case: Case
    index: Tensor
    leaves: dict[str, Tensor]
    frozen: dict[str, Tensor]
    table: RankTable
    dy: Tensor

    def cast(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> Layer:
        """All in another dtype; gates stay at least fp32."""
        kept = {n: t.to(torch.promote_types(dtype, torch.float32)) for n, t in self.leaves.items() if "gate" in n}
        pools = {n: t.to(adapters or dtype) for n, t in self.leaves.items() if n[-1] in "AB"}
        leaves = {n: t.to(dtype) for n, t in self.leaves.items()} | kept | pools
        frozen = {n: t.to(dtype) for n, t in self.frozen.items()}
        return replace(self, leaves=leaves, frozen=frozen, dy=self.dy.to(dtype))


def make_layer(case: Case, device: str = "cpu") -> Layer:
    """In fp32. Its values are whole multiples of 1/32, so that casting them to half precision changes nothing."""
    generator, experts = torch.Generator().manual_seed(0), len(case.ranks)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return ((size * torch.randn(*shape, generator=generator) * 32).round() / 32).to(device)

    table = make_table(case.ranks, 6, device)
    pool, wide = table.pool_size, 2 * INNER if case.gated else INNER
    index = torch.stack(
        [torch.randperm(experts, generator=generator)[: case.top_k] for _ in range(case.tokens)]
        or [torch.empty(case.top_k, dtype=torch.int64)]
    )[: case.tokens].to(device)
    if case.dropped and case.tokens:
        index[::3, 0] = experts
        index[-1] = experts
    if case.hot:
        index[:] = 2
    leaves = {
        "x": normal(case.tokens, HIDDEN),
        "weights": normal(case.tokens, case.top_k),
        **{"up_A": normal(pool, HIDDEN, size=0.25), "up_B": normal(pool, wide, size=0.4), "up_gate": normal(pool) + 1},
        **{"down_A": normal(pool, INNER, size=0.35), "down_B": normal(pool, HIDDEN, size=0.4)},
        "down_gate": normal(pool) + 1,
    }
    leaves["weights"][index == experts] = torch.nan
    dead = torch.ones(pool, dtype=torch.bool, device=device)
    dead[torch.cat([table.rows_of(expert) for expert in range(experts)])] = False
    for name in LEAVES[2:]:
        leaves[name][dead] = torch.nan
    frozen = {"up": normal(experts, wide, HIDDEN, size=0.25), "down": normal(experts, HIDDEN, INNER, size=0.35)}
    if case.transposed:
        frozen = {name: weight.mT.contiguous() for name, weight in frozen.items()}
    if case.biased:
        frozen |= {"up_bias": normal(experts, wide), "down_bias": normal(experts, HIDDEN)}
    return Layer(case, index, leaves, frozen, table, normal(case.tokens, HIDDEN))


def run(layer: Layer, leaves: dict[str, Tensor], **options) -> Tensor:
    up, down = (
        ExpertLinear(
            layer.frozen[name],
            *(leaves[f"{name}_{part}"] for part in ("A", "B", "gate")),
            layer.frozen.get(f"{name}_bias"),
            layer.case.transposed,
        )
        for name in ("up", "down")
    )
    return moe_lora_mlp(
        *(leaves["x"], layer.index, leaves["weights"], up, down, layer.table),
        **{"activation": layer.case.activation, "post": layer.case.post, "scaling": SCALING} | options,
    )


def oracle(layer: Layer, leaves: dict[str, Tensor]) -> Tensor:
    """In fp64, from the reference of one projection of one expert."""

    def projection(name: str) -> Callable[[Tensor, int], Tensor]:
        def project(rows: Tensor, expert: int) -> Tensor:
            own = layer.table.rows_of(expert)
            weight, bias = layer.frozen[name][expert], layer.frozen.get(f"{name}_bias")
            a, b, gate = (leaves[f"{name}_{part}"][own] for part in ("A", "B", "gate"))
            return lora_linear_reference(
                rows, a, b, gate=gate, scaling=SCALING, weight=weight.t() if layer.case.transposed else weight,
                bias=None if bias is None else bias[expert],
            )  # fmt: skip

        return project

    def down(rows: Tensor, expert: int) -> Tensor:
        y = projection("down")(rows, expert)
        return y if layer.case.post is None else layer.case.post(y)

    projections = (projection("up"), down)
    activation = {"silu": swiglu, "gelu_tanh": geglu}.get(layer.case.activation, layer.case.activation)
    return moe_lora_mlp_reference(
        leaves["x"], layer.index, leaves["weights"], projections, activation, layer.table.num_experts
    )


def differentiate(layer: Layer, function: Callable[[Layer, dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every leaf."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in layer.leaves.items()}
    y = function(layer, leaves)
    if not y.requires_grad:  # no tokens: the oracle never touched a leaf
        return {"y": y} | {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(y, list(leaves.values()), layer.dy.to(y.dtype), allow_unused=True)
    given = zip(leaves, leaves.values(), grads, strict=True)
    return {"y": y.detach()} | {n: torch.zeros_like(leaf) if g is None else g for n, leaf, g in given}


def check(actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each result."""
    for name, value in actual.items():
        assert value.shape == exact[name].shape
        if value.numel():
            error, largest = (value.double() - exact[name]).abs().max(), exact[name].abs().max()
            assert error <= tolerance * largest, f"{name} differs by {error:.3g} of {largest:.3g}"


DTYPES = [  # x, adapters, tolerance: some units in the last place, for sums of 4 * 16 * 2 terms
    ("eager", torch.float64, torch.float64, 1e-13),
    ("eager", torch.float32, torch.float32, 4e-6),
    ("eager", torch.bfloat16, torch.bfloat16, 6e-2),
    ("eager", torch.bfloat16, torch.float32, 6e-2),
    ("eager", torch.float16, torch.float32, 8e-3),
]
# The interpreter takes seconds for each.
INTERPRETED = ["transposed, biases, clamped", "post and dropped", "no tokens"]
INTERPRETED += ["silu by name", "gelu by name, transposed and dropped", "silu by name, biases"]
RUNS = [(name, *dtypes) for name in CASES for dtypes in DTYPES]
RUNS += [(name, "triton", torch.float32, torch.float32, 4e-6) for name in INTERPRETED]
NAMED = "gelu by name, transposed and dropped"
RUNS += [(name, "triton", torch.float16, torch.float32, 8e-3) for name in ("dropped", NAMED)]


@pytest.mark.parametrize(("name", "backend", "dtype", "adapters", "tolerance"), RUNS, ids=str)
def test_output_and_gradients(name, backend, dtype, adapters, tolerance):
    """Of x, the routing weights, the adapters and the gates of both projections."""
    case = CASES[name]
    layer = make_layer(case, DEVICE[backend])
    actual = differentiate(layer.cast(dtype, adapters), lambda *args: run(*args, backend=backend))
    exact = differentiate(layer.cast(torch.float64), oracle)
    assert actual["y"].dtype == dtype
    assert all(actual[leaf].dtype == adapters for leaf in LEAVES if leaf[-1] in "AB")
    check(actual, exact, tolerance)
    if case.dropped:
        dropped = layer.index == len(case.ranks)
        assert dropped.any() and not actual["weights"][dropped].any()
        assert not actual["y"][-1].any() and not actual["x"][-1].any()


@pytest.mark.parametrize("instructions", [True, False], ids=["own", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_of_any_cpu(dtype, instructions, monkeypatch):
    """Multiplied as it is, or widened to fp32: whichever this CPU would not choose is tested too."""
    monkeypatch.setattr(eager_primitives, "_compute_dtype", lambda x: x.dtype if instructions else torch.float32)
    layer = make_layer(Case(tokens=60, biased=True))
    actual = differentiate(layer.cast(dtype, torch.float32), run)
    exact = differentiate(layer.cast(torch.float64), oracle)
    check(actual, exact, 6e-2 if dtype == torch.bfloat16 else 8e-3)


def saved_shapes(function: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """The shapes of all floating-point tensors that autograd keeps."""
    shapes: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point():
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return shapes


def test_what_is_kept_for_backward():
    """Neither the permuted x nor the experts' outputs, both ``[T * k, H]``; only where ``post`` needs them."""
    rows = 13 * 2
    for case, expected in ((CASES["swiglu"], False), (CASES["post"], True)):
        layer = make_layer(case)
        leaves = {name: t.requires_grad_() for name, t in layer.leaves.items()}
        shapes = saved_shapes(lambda layer=layer, leaves=leaves: run(layer, leaves))
        assert (13, HIDDEN) in shapes and (rows, INNER) in shapes  # x, and the input of the second projection
        assert ((rows, HIDDEN) in shapes) == expected


def test_each_gradient_alone():
    """Equals the one that is computed with all others."""
    layer = make_layer(CASES["transposed, biases, clamped"])
    everything = differentiate(layer, run)
    for name in LEAVES:
        leaf = layer.leaves[name].detach().clone().requires_grad_()
        run(layer, layer.leaves | {name: leaf}).backward(layer.dy)
        torch.testing.assert_close(leaf.grad, everything[name])


def test_gradcheck():
    for case in (Case(tokens=3, biased=True), Case(tokens=3, post=rms_norm, dropped=True)):
        layer = make_layer(replace(case, ranks=(2, 0, 1))).cast(torch.float64)
        leaves = [t.nan_to_num().requires_grad_() for t in layer.leaves.values()]
        assert torch.autograd.gradcheck(
            lambda *given, layer=layer: run(layer, dict(zip(LEAVES, given, strict=True))), tuple(leaves)
        )


def test_demand():
    """The rows of each expert and the sums of their routing weights; dropped pairs count nowhere."""
    layer = make_layer(CASES["dropped"])
    demand = torch.zeros(2, 4, requires_grad=True)
    run(layer, layer.leaves, demand=demand).sum().backward()
    index, weights = layer.index.flatten(), layer.leaves["weights"].flatten()
    assert demand.grad[0].tolist() == index.bincount(minlength=5)[:4].tolist()
    sums = torch.zeros(5, device=weights.device).index_add_(0, index, weights)
    torch.testing.assert_close(demand.grad[1], sums[:4])


def test_growth_changes_no_bit():
    layer = make_layer(Case())
    layer.leaves = {name: t.nan_to_num() for name, t in layer.leaves.items()}
    before = run(layer, layer.leaves)
    born = layer.table.set_ranks([3, 1, 6, 4])
    for name in ("up_B", "down_B"):
        layer.leaves[name][born] = 0
    assert torch.equal(run(layer, layer.leaves), before)


def test_autocast():
    """fp32 operands give what bf16 ones give; routing weights of either dtype do."""
    layer = make_layer(Case(biased=True))
    exact = differentiate(layer.cast(torch.float64), oracle)
    for weights in (torch.float32, torch.bfloat16):
        layer.leaves["weights"] = layer.leaves["weights"].to(weights)
        leaves = {name: t.detach().clone().requires_grad_() for name, t in layer.leaves.items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = run(layer, leaves)
        assert y.dtype == torch.bfloat16
        y.backward(layer.dy.bfloat16())
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
        check({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}, exact, 6e-2)


def test_no_recompilation():
    """Over ranks, choices and batches, in one graph."""
    layer = make_layer(Case(tokens=11, biased=True))  # 11: no dimension that changes is equal
    leaves = {name: t.nan_to_num().requires_grad_() for name, t in layer.leaves.items()}

    def function(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        operands = leaves | {"x": x, "weights": weights}
        return run(replace(layer, index=index), operands)

    torch.compiler.reset()
    compiled = Compiled(function, dynamic=True)
    for tokens, ranks in ((13, (3, 0, 6, 2)), (13, (0, 0, 0, 0)), (7, (1, 6, 2, 4)), (20, (6, 1, 0, 1))):
        layer.table.set_ranks(ranks)
        other = make_layer(Case(tokens=tokens, dropped=tokens == 7))
        x, weights = (other.leaves[name].requires_grad_() for name in ("x", "weights"))
        inputs = [x, weights, *(leaves[name] for name in LEAVES[2:])]
        results = []
        for tried in (compiled, function):
            y = tried(x, other.index, weights)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


BAD = {
    "x of three dimensions": (lambda o: {"x": o["x"][None]}, "they must be \\[tokens, hidden\\]"),
    "weights of another shape": (lambda o: {"weights": o["weights"][:, :1]}, "they must be \\[tokens, hidden\\]"),
    "fewer tokens": (lambda o: {"x": o["x"][1:]}, "they must be \\[tokens, hidden\\]"),
    "pool of another size": (lambda o: {"up_A": o["up_A"][1:], "up_B": o["up_B"][1:]}, "the table hands out"),
    "gate of another size": (lambda o: {"down_gate": o["down_gate"][1:]}, "gate has shape"),
    "features that do not fit": (lambda o: {"down_A": o["down_A"][:, 1:]}, "last dimensions must be equal"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(change, message):
    layer = make_layer(Case())
    with pytest.raises(ValueError, match=message):
        run(layer, layer.leaves | change(layer.leaves))


def test_bad_settings():
    layer = make_layer(Case())
    with pytest.raises(ValueError, match="experts have the backends 'triton' and 'eager'"):
        run(layer, layer.leaves, backend="reference")
    with pytest.raises(ValueError, match="it must be from 0 to 4, where 4 itself drops"):
        run(replace(layer, index=layer.index + 3), layer.leaves)
    with pytest.raises(ValueError, match="activation is 'relu'; it must be a function, or one of"):
        run(layer, layer.leaves, activation="relu")
    for name, trained in (("up", layer.frozen["up"].clone().requires_grad_()),):
        with pytest.raises(ValueError, match="weight requires a gradient"):
            run(replace(layer, frozen=layer.frozen | {name: trained}), layer.leaves)


def test_a_second_differentiation_raises():
    layer = make_layer(Case())
    x = layer.leaves["x"].requires_grad_()
    (grad,) = torch.autograd.grad(run(layer, layer.leaves).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moe_lora_mlp was differentiated twice.*reference.moe_lora_mlp_reference"):
        grad.sum().backward()
