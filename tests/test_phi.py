"""phi as the sinc kernels compute it: its values, its slope and the sums over its coefficients, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.test_lora_linear import DEVICE

sinc = pytest.importorskip("lrlora_ops.kernels.sinc", reason="needs triton")
nine = pytest.importorskip("lrlora_ops.kernels._phi_nine", reason="needs triton")

GRID = 0.5
EPS = torch.finfo(torch.float32).eps
# Everywhere; at and next to where sin(pi w) is 0; where one form gives way to another; and far out.
NODES = torch.arange(-7.0, 8.0)
POINTS = torch.cat([torch.linspace(-6.5, 6.5, 111), NODES, NODES + 1e-6, NODES - 1e-4, torch.tensor([1e-30, 1e-3])])
POINTS = torch.cat(
    [POINTS, torch.tensor([4.5, -4.500001, 12.25, -100.75, 1e3 + 0.5, 9999.5, 3e4 + 0.5, -1e6, 1e12, 1e30])]
)


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
def test_phi(count):
    """Within a few roundings of the terms that are summed, by either way: of nine coefficients at most, and of more."""
    generator = torch.Generator().manual_seed(count)
    c, d = (torch.randn(size, generator=generator).to(DEVICE["triton"]) for size in (count, len(POINTS)))
    w = POINTS.to(c)
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


def test_the_ways_agree(monkeypatch):
    c, d = torch.linspace(-1, 1, 9, device=DEVICE["triton"]), torch.ones(len(POINTS), device=DEVICE["triton"])
    w = POINTS.to(c)
    by_powers = phi_and_gradients(w, c, d)
    monkeypatch.setattr(sinc, "NINE", 0)
    in_general = phi_and_gradients(w, c, d)
    for one, other in zip(by_powers, in_general, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_the_polynomial_is_what_it_stands_for():
    """log2 of ``prod_{i > 6} (1 - w^2 / i^2)``, which is ``6!^2 / (Gamma(7 + w) Gamma(7 - w))``."""
    for w in torch.linspace(1e-3, 4.5, 500).tolist():
        exact = (2 * math.lgamma(7) - math.lgamma(7 + w) - math.lgamma(7 - w)) / math.log(2)
        fitted = w**2 * sum(term * w ** (2 * j) for j, term in enumerate(nine._LOG))
        assert abs(fitted - exact) < 5e-8
