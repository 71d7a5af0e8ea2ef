"""Nothing makes the host wait for the device: neither an op, forward or backward, nor a step of the adapters.

On CPU tensors, whose values are there at once: what is refused is any operation that would wait for a GPU's.
"""

from __future__ import annotations

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
)
from tests._launches import counted_launches
from tests.test_grouped_lora_linear import make_table
from tests.test_primitives_contract import DEVICES

DEVICE = DEVICES["triton"]
ROWS, IN, OUT, RANK = 9, 20, 12, 3
TABLE = make_table((3, 0, 2), RANK, DEVICE)


def on_device(values: int | list[int]) -> Tensor:
    """int32, of a class that the ops' checks, which read plain CPU tensors alone, take for one on the device."""
    return nn.Parameter(torch.tensor(values, dtype=torch.int32, device=DEVICE), requires_grad=False)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def dense(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, **base: Tensor) -> Tensor:
    return lora_linear(x, a, b, gate=gate, rank=on_device(2), backend="triton", **base)


def grouped(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, **base: Tensor) -> Tensor:
    offsets = on_device([0, 4, 6, 8])  # a row is no expert's
    return grouped_lora_linear(x, a, b, offsets, TABLE, gate=gate, backend="triton", **base)


OPS = {
    "lora_linear": (dense, RANK, {}),
    "lora_linear, weight and bias": (dense, RANK, {"weight": (OUT, IN), "bias": (OUT,)}),
    "lora_linear, base": (dense, RANK, {"base": (ROWS, OUT)}),
    "grouped_lora_linear": (grouped, TABLE.pool_size, {}),
    "grouped_lora_linear, weight and bias": (grouped, TABLE.pool_size, {"weight": (3, OUT, IN), "bias": (3, OUT)}),
    "grouped_lora_linear, base": (grouped, TABLE.pool_size, {"base": (ROWS, OUT)}),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_ops(op):
    """With every gradient there is."""
    call, pool_size, shapes = op
    leaves = [
        normal(*shape).requires_grad_() for shape in ((ROWS, IN), (pool_size, IN), (pool_size, OUT), (pool_size,))
    ]
    base = {name: normal(*shape).requires_grad_(name == "base") for name, shape in shapes.items()}
    dy = normal(ROWS, OUT)
    with counted_launches() as launched:
        y = call(*leaves, **base)
        forward = len(launched)
        grads = torch.autograd.grad(y, [*leaves, *(t for t in base.values() if t.requires_grad)], dy)
    assert all(grad.any() for grad in grads)
    for part in (launched[:forward], launched[forward:]):
        assert any(name.endswith("_kernel") for name in part), "no Triton kernel was launched"


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
