"""Nothing makes the host wait for the device: neither an op, forward or backward, nor a step of the adapters.

On CPU tensors, whose values are there at once: what is refused is any operation that would wait for a GPU's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import (
    DynamicRank,
    FixedRank,
    LearnedRank,
    VariableRankLoRAGroupedLinear,
    VariableRankLoRALinear,
    apply_lora,
    grouped_lora_linear,
    lora_linear,
    ops,
    sinc_lora_linear,
)
from tests import test_moe_sinc_mlp
from tests._launches import counted_launches
from tests.test_grouped_lora_linear import make_table
from tests.test_moe_launches import grow
from tests.test_moe_lora_mlp import CASES, make_layer
from tests.test_moe_lora_mlp import run as run_layer
from tests.test_primitives_contract import DEVICES

DEVICE = DEVICES["triton"]
ROWS, IN, OUT, RANK = 9, 20, 12, 3


@dataclass
class Op:
    """A call of an op, its leaves, and what else on the device may change from step to step: ranks and routing."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    change: Callable[[], object] | None = None

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
        return torch.autograd.grad(y, self.leaves, dy)


def on_device(values: int | list[int]) -> Tensor:
    """int32, of a class that the ops' checks, which read plain CPU tensors alone, take for one on the device."""
    return nn.Parameter(torch.tensor(values, dtype=torch.int32, device=DEVICE), requires_grad=False)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def adapter(pool_size: int, base: dict[str, tuple[int, ...]]) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """x, A, B and gate, the base's tensors, and which of all these are leaves."""
    given = [normal(*shape).requires_grad_() for shape in ((ROWS, IN), (pool_size, IN), (pool_size, OUT), (pool_size,))]
    tensors = {name: normal(*shape).requires_grad_(name == "base") for name, shape in base.items()}
    return given, tensors, [*given, *(t for t in tensors.values() if t.requires_grad)]


def dense(**base: tuple[int, ...]) -> Op:
    (x, a, b, gate), tensors, leaves = adapter(RANK, base)
    rank = on_device(2)
    return Op(
        lambda: lora_linear(x, a, b, gate=gate, rank=rank, backend="triton", **tensors),
        leaves,
        lambda: rank.fill_(RANK),
    )


def grouped(**base: tuple[int, ...]) -> Op:
    table, offsets = make_table((3, 0, 2), RANK, DEVICE), on_device([0, 4, 6, 8])  # a row is no expert's
    (x, a, b, gate), tensors, leaves = adapter(table.pool_size, base)

    def change() -> None:
        table.set_ranks([1, 2, 3])
        offsets.copy_(torch.tensor([0, 2, 7, 9]))

    return Op(
        lambda: grouped_lora_linear(x, a, b, offsets, table, gate=gate, backend="triton", **tensors), leaves, change
    )


def sinc() -> Op:
    (x, a, b, _), tensors, _ = adapter(RANK, {"weight": (OUT, IN), "bias": (OUT,)})
    coefficients = normal(5).requires_grad_()
    return Op(
        lambda: sinc_lora_linear(
            *(x, tensors["weight"], a, b, coefficients), grid=0.5, scaling=0.7, bias=tensors["bias"], backend="triton"
        ),
        [x, a, b, coefficients],
    )


def layer(case: str) -> Op:
    made = make_layer(CASES[case], DEVICE)
    leaves = {name: t.nan_to_num().requires_grad_() for name, t in made.leaves.items()}
    made.leaves = leaves
    demand = torch.zeros(2, made.table.num_experts, device=DEVICE, requires_grad=True)

    @torch.no_grad()
    def change() -> None:
        grow(made, [4, 1, 6, 3])
        made.index.copy_((made.index + 1) % made.table.num_experts)

    return Op(lambda: run_layer(made, leaves, backend="triton", demand=demand), [*leaves.values(), demand], change)


def sinc_layer() -> Op:
    made = test_moe_sinc_mlp.layer(test_moe_sinc_mlp.CASES["an expert without rows"], backend="triton")
    made.frozen = {name: t.nan_to_num(0.5) for name, t in made.frozen.items()}

    def change() -> None:
        made.index.copy_((made.index + 1) % test_moe_sinc_mlp.EXPERTS)

    return Op(lambda: test_moe_sinc_mlp.run(made, backend="triton"), [*made.leaves.values()], change)


OPS = {
    "lora_linear": dense,
    "lora_linear, weight and bias": lambda: dense(weight=(OUT, IN), bias=(OUT,)),
    "lora_linear, base": lambda: dense(base=(ROWS, OUT)),
    "grouped_lora_linear": grouped,
    "grouped_lora_linear, weight and bias": lambda: grouped(weight=(3, OUT, IN), bias=(3, OUT)),
    "grouped_lora_linear, base": lambda: grouped(base=(ROWS, OUT)),
    "sinc_lora_linear": sinc,
    "moe_sinc_mlp": sinc_layer,
    "moe_lora_mlp, silu by name": lambda: layer("silu by name"),
    "moe_lora_mlp, the model's own activation": lambda: layer("swiglu"),
}


def test_every_op_is_here():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert {name.partition(",")[0] for name in OPS} == functions


@pytest.mark.parametrize("make", OPS.values(), ids=OPS.keys())
def test_ops(make):
    """With every gradient there is. And as in a captured graph: what changes in place shows when the launches of the
    first step are made again, bit for bit."""
    op = make()
    with counted_launches() as launched:
        y = op.call()
        forward = len(launched)
        gradients = op.gradients(y)
    assert all(gradient.any() for gradient in gradients)
    for part in (launched[:forward], launched[forward:]):
        assert any(name.endswith("_kernel") for name in part), "no Triton kernel was launched"
    for change in (lambda: train(op.leaves), op.change):
        if change is not None:
            before = y.detach().clone()
            change()
            launched.replay()
            expected = op.call()
            assert torch.equal(y, expected) and not torch.equal(y, before)
            assert all(torch.equal(*pair) for pair in zip(gradients, op.gradients(expected), strict=True))


@torch.no_grad()
def train(leaves: list[Tensor]) -> None:
    """Other values, in place."""
    for leaf in leaves:
        leaf.mul_(torch.linspace(0.5, 1.5, leaf.numel(), device=DEVICE).view_as(leaf))


def dense_model(**options) -> nn.Module:
    return nn.Sequential(*(VariableRankLoRALinear(6, 5, **options) for _ in range(3)))


def experts_model(**options) -> nn.Module:
    return nn.Sequential(*(VariableRankLoRAGroupedLinear(4, 6, 5, **options) for _ in range(3)))


STEPS = 20
METHODS = {
    "FixedRank": (FixedRank(2), dense_model(rank=2, max_rank=2)),
    "LearnedRank": (LearnedRank(mean_rank=2, max_rank=4, total_steps=STEPS), dense_model(rank=2, max_rank=4)),
    "LearnedRank of experts": (
        LearnedRank(mean_rank=2, max_rank=4, total_steps=STEPS),
        experts_model(rank=2, max_rank=4),
    ),
    "LearnedRank with a price": (
        LearnedRank(mean_rank=2, max_rank=4, total_steps=STEPS, penalty=0.1),
        dense_model(rank=2, max_rank=4),
    ),
    "DynamicRank": (
        DynamicRank(initial_rank=1, target_rank=2, max_rank=4, total_steps=STEPS, interval=5),
        experts_model(rank=1, max_rank=4, pool_rank=2),
    ),
    "DynamicRank as released": (
        DynamicRank(initial_rank=1, target_rank=2, max_rank=4, total_steps=STEPS, interval=5, variant="released"),
        experts_model(rank=1, max_rank=4, pool_rank=3),
    ),
}


@pytest.mark.parametrize(("method", "model"), METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("loss_scale", [1.0, torch.tensor(1024.0)], ids=["unscaled", "scaled"])
def test_steps(method, model, loss_scale):
    """A whole run: warm-up, growths, sampled prefixes, the freeze."""
    adapters = apply_lora(model, method, targets=None)
    generator = torch.Generator().manual_seed(0)
    before = {name: table.ranks.clone() for name, table in adapters.tables.items()}
    for _ in range(STEPS):
        for table in adapters.tables.values():
            table.gate.grad = torch.randn(table.gate.shape, generator=generator)
            table.demand.grad = torch.rand(table.demand.shape, generator=generator)
        loss = torch.rand((), generator=generator)
        with counted_launches():
            adapters.step(loss, loss_scale=loss_scale)
    changed = any(not torch.equal(table.ranks, before[name]) for name, table in adapters.tables.items())
    assert changed != isinstance(method, FixedRank)
    assert all(policy.frozen for policy in adapters.policies)
