"""Gated activations by name on a CPU: parity, gradients, what is kept for backward, and blocks of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrlora_ops import eager
from lrlora_ops.ops._activation import gated_activation
from tests._oracle import assert_within_budget
from tests.test_lora_linear_autograd import saved_for_backward

INNER = 24
PLAIN = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
each_activation = pytest.mark.parametrize("activation", PLAIN)


def gate_up(rows: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(rows, 2 * INNER, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


def results(h: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    dh = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).half().to(h)
    return h.detach(), torch.autograd.grad(h, leaf, dh)[0]


def plain(leaf: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gate, up = leaf.chunk(2, -1)
    return results(PLAIN[activation](gate) * up, leaf)


@each_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_parity(activation, dtype, rows, monkeypatch):
    """In blocks of two rows for each thread, the last of fewer."""
    monkeypatch.setattr("lrlora_ops._live.BLOCK_ELEMENTS", 4 * INNER)
    leaf = gate_up(rows, dtype)
    actual = results(gated_activation(leaf, activation), leaf)
    exact = plain(leaf.detach().double().requires_grad_(), activation)
    for one, other, usual in zip(actual, exact, plain(leaf, activation), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert_within_budget(one, other, usual)


@each_activation
def test_gradcheck(activation):
    assert torch.autograd.gradcheck(partial(gated_activation, activation=activation), gate_up(5, torch.float64))


@each_activation
def test_only_its_input_is_kept(activation):
    leaf = gate_up(5, torch.bfloat16)
    assert [t.data_ptr() for t in saved_for_backward(lambda: gated_activation(leaf, activation))] == [leaf.data_ptr()]


def test_twice_differentiated():
    leaf = gate_up(2, torch.float32)
    [grad] = torch.autograd.grad(gated_activation(leaf, "silu").sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_lora_mlp_reference"):
        grad.sum().backward()


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_tokens_change_no_bit_of_what_they_combine(weighted, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(26, INNER, generator=generator).bfloat16()
    positions = torch.randperm(26, generator=generator).view(13, 2)
    weights = torch.rand(13, 2, generator=generator) if weighted else None
    whole = eager.combine(rows, positions, weights)
    monkeypatch.setattr("lrlora_ops._live.BLOCK_ELEMENTS", 2 * INNER)
    assert torch.equal(eager.combine(rows, positions, weights), whole)
    factors = torch.ones(13, 2) if weights is None else weights
    exact = (rows[positions].double() * factors[..., None]).sum(1)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-8, atol=1e-6)
