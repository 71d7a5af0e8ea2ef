"""dropout of both backends: a mask that follows from the seed alone, and the right values under it."""

from __future__ import annotations

import importlib

import pytest
import torch

from lrlora_ops import eager

triton_ops = importlib.import_module("lrlora_ops.kernels.primitives")
DEVICES = {"eager": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
OPS = {"eager": eager, "triton": triton_ops}

pytestmark = pytest.mark.usefixtures("poison")
each_backend = pytest.mark.parametrize("backend", OPS)
each_shape = pytest.mark.parametrize("shape", [(33, 300), (1, 1), (0, 8), (8, 0)], ids=str)


def draw(backend, shape, dtype=torch.float32, number=1):
    """The primitives, x without a zero, and a seed on x's device."""
    generator = torch.Generator().manual_seed(number)
    x = (torch.rand(shape, generator=generator) + 0.5).to(DEVICES[backend], dtype)
    return OPS[backend], x, torch.tensor(2**40 + number, device=x.device)


@each_backend
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values(backend, shape, dtype):
    """Each element is dropped or scaled by 1 / (1 - p)."""
    ops, x, seed = draw(backend, shape, dtype)
    dropped = ops.dropout(x, seed, 0.25)
    assert dropped.dtype == dtype
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, x / 0.75))


@each_backend
def test_probability(backend):
    """The share of dropped elements is p within five standard deviations, in all and in each row and column."""
    ops, x, seed = draw(backend, (100, 500))
    for p in (0.1, 0.5):
        dropped = (ops.dropout(x, seed, p) == 0).double()
        for share, count in ((dropped.mean(), 50_000), (dropped.mean(0), 100), (dropped.mean(1), 500)):
            assert ((share - p).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all()
    assert torch.equal(ops.dropout(x, seed, 0.0), x)


@each_backend
def test_seed(backend):
    """The seed decides, not the state of any generator, nor the dtype, the layout or the number of threads."""
    ops, x, seed = draw(backend, (40, 300))
    mask = ops.dropout(x, seed, 0.5) == 0
    torch.rand(1)
    assert torch.equal(ops.dropout(x, seed, 0.5) == 0, mask)
    assert torch.equal(ops.dropout(x.half(), seed, 0.5) == 0, mask)
    assert torch.equal(ops.dropout(x.t().contiguous().t(), seed, 0.5) == 0, mask)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(ops.dropout(x, seed, 0.5) == 0, mask)
    finally:
        torch.set_num_threads(threads)
    other = ops.dropout(x, seed + 1, 0.5) == 0
    assert 0.45 < (other == mask).double().mean() < 0.55, "masks of neighbouring seeds are not independent"


@each_backend
def test_rows_and_columns_are_independent(backend):
    """No row or column repeats the mask of another: neighbours agree in half of their elements."""
    ops, x, seed = draw(backend, (64, 512))
    mask = (ops.dropout(x, seed, 0.5) == 0).double()
    for a, b in (
        (mask[1:], mask[:-1]),
        (mask[:, 1:], mask[:, :-1]),
        (mask[16:], mask[:-16]),
        (mask[:, 256:], mask[:, :-256]),
    ):
        assert 0.47 < (a == b).double().mean() < 0.53
