"""phi as the sinc kernels compute it: its values, its slope and the sums over its coefficients, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.test_lora_linear import DEVICE

sinc = pytest.importorskip("lrlora_ops.kernels.sinc", reason="needs triton")
near = pytest.importorskip("lrlora_ops.kernels._phi_near", reason="needs triton")

GRID = 0.5
EPS = torch.finfo(torch.float32).eps
# Everywhere, next to where sin(pi w) is 0 and at it, and at the ends of what the polynomials are for.
NODES = torch.arange(-4.0, 5.0)
POINTS = torch.cat([torch.linspace(-4.5, 4.5, 97), NODES, NODES + 1e-6, NODES - 1e-4, torch.tensor([1e-30, 1e-3])])
AFAR = torch.cat([POINTS, torch.tensor([5.0, -7.25, 1e3, 1e6])])


def phi_and_gradients(w: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi, ``d phi'`` and ``sum d (psi_k - psi_k(0))`` of elements, by the kernels: a matrix of one row, and rank 1."""
    a, one = (w * GRID)[None].contiguous(), w.new_ones(1, 1)
    zeros = torch.zeros_like(a)
    phi = sinc.sinc_weight(zeros, a, one, c, GRID, 1.0, torch.float32)
    m = d[None].clone()
    d_a, _, d_c = sinc.sinc_gradients(m, zeros, a, one, c, GRID, 1.0)
    torch.testing.assert_close(m, phi, rtol=0, atol=4 * EPS * float(c.abs().sum()))  # the weight that dx is made of
    return phi[0], d_a[0], d_c


def exact(w: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64, from the definition, and from its series where that would divide 0 by 0."""
    w, c, d = w.double(), c.double(), d.double()
    reach = len(c) // 2
    u = w - torch.arange(-reach, reach + 1, device=w.device)[:, None]
    psi, square = torch.sinc(u), (math.pi * u) ** 2
    slopes = torch.where(u.abs() < 1e-3, -square / u.masked_fill(u == 0, 1) / 3 * (1 - square / 10), 0)
    slopes = slopes.where(u.abs() < 1e-3, (torch.cos(math.pi * u) - psi) / u)
    psi[reach] -= 1
    return w * GRID + c @ psi, d * (1 + c @ slopes / GRID), psi @ d


@pytest.mark.parametrize("count", [1, 5, 9, 11])
@pytest.mark.parametrize("points", [POINTS, AFAR], ids=["near", "afar"])
def test_phi(points, count):
    """Within a few roundings of the terms that are summed; eleven coefficients are too many for the polynomials."""
    generator = torch.Generator().manual_seed(count)
    c, d = (torch.randn(size, generator=generator).to(DEVICE["triton"]) for size in (count, len(points)))
    w = points.to(c)
    actual, expected = phi_and_gradients(w, c, d), exact(w, c, d)
    # Of a value, a slope and a sum: how large the terms may be of which each is made.
    terms = (w.abs() * GRID + c.abs().sum(), d.abs() * (1 + 2 * c.abs().sum() / GRID), d.abs().sum())
    for name, value, wanted, size in zip(("phi", "slope", "d_c"), actual, expected, terms, strict=True):
        assert ((value.double() - wanted).abs() <= 4 * EPS * size).all(), name


@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_nothing_cancels_where_z_is_small(scale):
    """psi_0(z) - psi_0(0) is as small as z^2: its sum is accurate in itself, not beside 1."""
    generator = torch.Generator().manual_seed(0)
    w = scale * torch.randn(300, generator=generator).to(DEVICE["triton"])
    d = torch.rand(300, generator=generator).to(w)
    c = torch.randn(9, generator=generator).to(w)
    *_, d_c = phi_and_gradients(w, c, d)
    wanted = exact(w, c, d)[2]
    torch.testing.assert_close(d_c[4].double(), wanted[4], rtol=1e-5, atol=0)


def test_near_elements_are_computed_by_the_polynomials(monkeypatch):
    c, d = torch.linspace(-1, 1, 9, device=DEVICE["triton"]), torch.ones(len(POINTS), device=DEVICE["triton"])
    w = POINTS.to(c)
    by_polynomials = phi_and_gradients(w, c, d)
    monkeypatch.setattr(sinc, "NEAR_COUNT", 0)
    in_general = phi_and_gradients(w, c, d)
    for one, other in zip(by_polynomials, in_general, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_the_envelope_is_what_its_polynomial_says():
    """log2 of ``4!^2 / (Gamma(5 + w) Gamma(5 - w))`` without the factors ``1 - w^2 / 25`` and ``1 - w^2 / 36``."""
    for w in (POINTS.abs() + 1e-3).clamp(max=4.5).tolist():
        square = w * w
        front = math.log2((1 - square / 25) * (1 - square / 36))
        gammas = (2 * math.lgamma(5) - math.lgamma(5 + w) - math.lgamma(5 - w)) / math.log(2)
        fitted = square * sum(term * square**j for j, term in enumerate(near._LOG))
        assert abs(fitted + front - gammas) < 5e-8
