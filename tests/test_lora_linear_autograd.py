"""lora_linear inside PyTorch's machinery: autocast, checkpointing, double backward, dropout, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrlora_ops import lora_linear

BACKENDS = ["eager", "triton"]
DEVICE = {"eager": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def operands(
    backend: str = "eager", dtype: torch.dtype = torch.float32, rows=(6,), k=20, n=12, r=5
) -> dict[str, Tensor]:
    """x, lora_A, lora_B and gate, which require gradients, and a frozen weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE[backend], dtype)

    leaves = {
        "x": normal(*rows, k),
        "lora_A": normal(r, k, dtype=torch.float32),
        "lora_B": normal(r, n, dtype=torch.float32),
        "gate": normal(r, dtype=torch.float32),
    }
    return {name: t.requires_grad_() for name, t in leaves.items()} | {"weight": normal(n, k), "bias": normal(n)}


def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = {name: t.grad for name, t in tensors.items() if t.grad is not None}
    for t in tensors.values():
        t.grad = None
    return grads


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", ["weight", "base", ""])
def test_autocast_casts_like_linear(dtype, frozen):
    """x and the base product; gradients come in the dtype of each leaf, and backward runs outside of autocast."""
    given = operands(dtype=dtype)
    weight, bias = given.pop("weight"), given.pop("bias")
    base = (given["x"] @ weight.t()).detach().requires_grad_()
    frozen_part = {"weight": {"weight": weight, "bias": bias}, "base": {"base": base}, "": {}}[frozen]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**given, **frozen_part)
        assert y.dtype == F.linear(given["x"], weight, bias).dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(t.grad.dtype == t.dtype for t in given.values())

    cast = {name: t.detach().requires_grad_() for name, t in given.items()}
    cast["x"] = cast["x"].detach().bfloat16().requires_grad_()
    expected = lora_linear(**cast, **{name: t.detach().bfloat16() for name, t in frozen_part.items()})
    expected.float().square().mean().backward()
    assert torch.equal(y, expected)
    for name, t in given.items():
        assert torch.equal(t.grad, cast[name].grad.to(t.dtype))


def test_autocast_leaves_float64_alone():
    given = operands(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(**given).dtype == torch.float64


@each_backend
def test_backward_inside_autocast_has_the_forward_s_precision(backend):
    given = operands(backend)
    y = lora_linear(**given, backend=backend)
    y.sum().backward(retain_graph=True)
    expected = gradients(given)
    with torch.autocast(DEVICE[backend], torch.bfloat16):
        y.sum().backward()
    assert_equal(gradients(given), expected)


@each_backend
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_bit(use_reentrant, dropout, backend):
    """Forward runs twice, with the same dropout mask; the sensitivity is counted once."""
    given = operands(backend)
    runs = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return lora_linear(**given | {"x": x}, dropout=dropout, backend=backend).tanh()

    torch.manual_seed(3)
    plain = forward(given["x"])
    plain.sum().backward()
    expected, runs = gradients(given), 0
    torch.manual_seed(3)
    y = checkpoint(forward, given["x"], use_reentrant=use_reentrant)
    torch.rand(7)  # what happens between forward and backward does not matter
    y.sum().backward()
    assert runs == 2
    assert torch.equal(y, plain)
    assert_equal(gradients(given), expected)


@pytest.mark.parametrize("function", [torch.sum, lambda y: y.square().sum()], ids=["constant dy", "dy with a graph"])
@pytest.mark.parametrize("by", ["x", "lora_A", "lora_B", "gate"])
def test_differentiating_twice_is_an_error_that_says_what_to_do(by, function):
    """Also where the gradient that comes in is a constant: PyTorch's once_differentiable lets that pass."""
    given = operands()
    (d_x,) = torch.autograd.grad(function(lora_linear(**given)), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_linear was differentiated twice.*backend='reference'"):
        torch.autograd.grad(d_x.square().sum(), given[by])
    with pytest.raises(RuntimeError, match="lora_linear was differentiated twice"):
        (function(lora_linear(**given)) + d_x.square().sum()).backward()


def test_the_reference_backend_differentiates_twice():
    given = {name: t.detach().double() for name, t in operands(rows=(2,), k=3, n=4, r=2).items()}
    names = ("x", "lora_A", "lora_B", "gate")

    def function(*leaves: Tensor) -> Tensor:
        return lora_linear(**given | dict(zip(names, leaves, strict=True)), backend="reference")

    assert torch.autograd.gradgradcheck(function, tuple(given[name].requires_grad_() for name in names))


@each_backend
def test_create_graph_alone_is_no_error(backend):
    given = operands(backend)
    lora_linear(**given, backend=backend).square().sum().backward()
    expected = gradients(given)
    lora_linear(**given, backend=backend).square().sum().backward(create_graph=True)
    assert_equal(gradients(given), expected)
    x = given["x"]
    (d_x,) = torch.autograd.grad(lora_linear(**given, backend=backend).sum(), x, create_graph=True)
    other = torch.randn(6, device=x.device, requires_grad=True)
    other.square().sum().mul(d_x.detach().sum()).backward()  # a second order elsewhere


@each_backend
@pytest.mark.parametrize("name", ["rank", "gate", "lora_A"])
def test_a_step_between_forward_and_backward_is_an_error(name, backend):
    """Of the method or the optimizer: backward would be of another function."""
    rank = torch.tensor(3, dtype=torch.int32, device=DEVICE[backend])
    given = operands(backend) | {"rank": rank}
    y = lora_linear(**given, backend=backend)
    with torch.no_grad():
        given[name].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_backend
def test_dropout_masks(backend):
    """With x all ones and A, B identities the update is the mask: p holds, and backward has the very same mask."""
    size, p = 64, 0.3
    x = torch.ones(80, size, device=DEVICE[backend], requires_grad=True)
    lora_A, lora_B = (torch.eye(size, device=x.device).requires_grad_() for _ in range(2))
    torch.manual_seed(0)
    first, second = (lora_linear(x, lora_A, lora_B, dropout=p, backend=backend) for _ in range(2))
    torch.manual_seed(0)
    again = lora_linear(x, lora_A, lora_B, dropout=p, backend=backend)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    mask = first.detach()
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    assert abs(1 - kept.float().mean() - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    dy = torch.randn_like(mask)
    d_x, d_a, d_b = torch.autograd.grad(first, (x, lora_A, lora_B), dy)
    torch.testing.assert_close(d_x, mask * dy)
    torch.testing.assert_close(d_a, dy.t() @ mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_b, mask.t() @ dy, rtol=1e-4, atol=1e-4)


@each_backend
def test_dropout_leaves_the_base_product_alone(backend):
    given = operands(backend, rows=(50,))
    given["lora_B"] = torch.zeros_like(given["lora_B"])
    y = lora_linear(**given, dropout=0.9, backend=backend)
    assert torch.equal(y, F.linear(given["x"], given["weight"], given["bias"]))


def saved_for_backward(function) -> list[Tensor]:
    """What autograd keeps between forward and backward, each memory once, without parameters."""
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return [t for t in saved.values() if t.numel()]


@each_backend
@pytest.mark.parametrize("frozen", ["weight", "base"])
def test_neither_a_mask_nor_an_output_is_kept(frozen, backend):
    """x, the parameters, the seed, the rank, and U ``[M, rank capacity]``: nothing else."""
    rows, k, n, r = 64, 96, 80, 16
    given = operands(backend, rows=(rows,), k=k, n=n, r=r)
    weight, bias = given.pop("weight"), given.pop("bias")
    if frozen == "weight":
        given |= {"weight": weight, "bias": bias}
    else:
        given["base"] = F.linear(given["x"], weight, bias).detach().requires_grad_()
    rank = torch.tensor(7, dtype=torch.int32, device=weight.device)
    saved = saved_for_backward(lambda: lora_linear(**given, rank=rank, dropout=0.2, backend=backend))
    shapes = sorted(tuple(t.shape) for t in saved)
    parameters = [(r, k), (r, n), (r,)] + ([(n, k)] if frozen == "weight" else [])
    assert shapes == sorted([(rows, k), *parameters, (rows, r), (1,), ()])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_at_most_what_peft_keeps(dtype, dropout):
    """Bytes for backward of one layer, fp32 adapters, the parameters not counted."""
    peft = pytest.importorskip("peft")
    from lrlora_ops import FixedRank, apply_lora

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(96, 80)).to(dtype)

    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["0"])
    theirs, ours = peft.get_peft_model(model(), config).train(), model()
    apply_lora(ours, FixedRank(16), "all-linear", dropout=dropout)
    x = torch.randn(64, 96, dtype=dtype, requires_grad=True)

    def kept(m: nn.Module) -> int:
        return sum(t.untyped_storage().nbytes() for t in saved_for_backward(lambda: m(x)))

    assert kept(ours) <= kept(theirs)
