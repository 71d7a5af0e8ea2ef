"""sinc_weight and sinc_gradients in PyTorch: what CPU tensors run on, in tiles that stay in a core's cache.

With ``w = z / h``, m the nearest integer, ``f = w - m`` and ``r_k = 1 / (w - k)``, one sine serves all k:

    sinc(w - k)  = (-1)^(m - k) sin(pi f) / pi * r_k
    sinc'(w - k) = (-1)^(m - k) (sinc(f) (m - k) r_k^2 + f^2 g(f) r_k)         g(f) = (cos(pi f) - sinc(f)) / f^2

Both sums over k are finite and cancel nowhere, near ``w = k`` too, if f is kept off zero: there ``f r_k = 1`` and
``(m - k) r_k^2 = 0``. g is even and smooth on ``|f| <= 1/2``, so that its series is short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The least |f|: a power of two, so that f (1 / f) is 1 to the bit, and large enough for 1 / f.
_LEAST = 2.0**-60
_TILE = 2**16  # elements for each thread; ten such buffers in fp32 take 2.6 MB


def _series(dtype: torch.dtype) -> list[float]:
    """Coefficients of g(f) in powers of f^2, as many as the dtype can tell."""
    terms = range(1, 14 if dtype == torch.float64 else 8)
    return [(-1) ** j * math.pi ** (2 * j) * 2 * j / math.factorial(2 * j + 1) for j in terms]


class _Basis:
    """The sinc functions on one tile after another, in buffers that are allocated once."""

    def __init__(self, coefficients: Tensor, grid: float, like: Tensor) -> None:
        self.reach = len(coefficients) // 2
        self.c = coefficients.tolist()
        self.signed = [(k, c * (-1) ** k) for k, c in zip(range(-self.reach, self.reach + 1), self.c, strict=True)]
        self.grid, self.series = grid, _series(like.dtype)
        self.size = _TILE * torch.get_num_threads()
        self.buffers = like.new_empty(10, min(self.size, like.numel()))
        self.buffers[-1] = 1

    def tiles(self, values: Tensor) -> tuple[Tensor, ...]:
        """A contiguous tensor in pieces that the buffers are for."""
        return values.view(-1).split(self.size)

    def _locate(self, z: Tensor) -> None:
        """w, m, f, and ``(-1)^m`` as sign, of the elements of a tile; w is an ulp at least away from every k."""
        self.w, self.m, self.f, self.sign, self.sine, self.p, self.t, self.r, self.s, self.one = (
            buffer[: z.numel()] for buffer in self.buffers
        )
        torch.mul(z, 1 / self.grid, out=self.w)
        torch.round(self.w, out=self.m)
        torch.sub(self.w, self.m, out=self.f)
        if z.numel() and torch.abs(self.f, out=self.s).amin() < _LEAST:
            centres = torch.abs(self.m, out=self.s).clamp_(max=self.reach)
            ulps = centres.mul_(2 * torch.finfo(z.dtype).eps).add_(_LEAST)
            torch.sub(self.w.add_(torch.copysign(ulps, self.f)), self.m, out=self.f)
        torch.mul(self.m, 0.5, out=self.sign).frac_().abs_().mul_(-4).add_(1)
        self.p.zero_()

    def _finish(self, z: Tensor) -> None:
        """phi(z) in the place of z, with p, the sum of ``(-1)^k c_k r_k``, and the sine ``(-1)^m sin(pi f) / pi``."""
        z.sub_(self.c[self.reach]).addcmul_(self.sine, self.p)

    def value(self, z: Tensor) -> None:
        """phi(z) in the place of z."""
        self._locate(z)
        for k, c in self.signed:
            self.p.addcdiv_(self.one, torch.sub(self.w, k, out=self.r), value=c)
        torch.mul(self.f, math.pi, out=self.sine).sin_().mul_(self.sign).mul_(1 / math.pi)
        self._finish(z)

    def differentiate(self, z: Tensor, d: Tensor, d_c: Tensor) -> None:
        """phi(z) in the place of z, ``d phi'(z)`` in that of d, and ``sum d (psi_k(z) - psi_k(0))`` added to d_c."""
        self._locate(z)
        self.t.zero_()
        square = self.f.square()
        bent = torch.full_like(square, self.series[-1])  # f^2 g(f)
        for coefficient in reversed(self.series[:-1]):
            bent.mul_(square).add_(coefficient)
        bent.mul_(square)
        below_one = torch.mul(self.f, math.pi / 2, out=self.s).sin_().square_().mul_(-2).sub_(bent)  # sinc(f) - 1
        sinc = (below_one + 1).mul_(self.sign)
        d_sine = torch.mul(sinc, self.f, out=self.sine) * d
        centre = torch.where(self.m == 0, d * below_one, torch.div(d_sine, self.w).sub_(d)).sum()
        for index, (k, c) in enumerate(self.signed):
            torch.sub(self.w, k, out=self.r).reciprocal_()
            d_c[index] += centre if k == 0 else torch.dot(d_sine, self.r) * (-1) ** k
            self.p.add_(self.r, alpha=c)
            self.t.addcmul_(torch.sub(self.m, k, out=self.s).mul_(self.r), self.r, value=c)
        slope = bent.mul_(self.p).mul_(self.sign).addcmul_(sinc, self.t)
        d.mul_(slope.mul_(1 / self.grid).add_(1))
        self._finish(z)


def _product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``b^T a``, in fp32 or, for fp64, that."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return b.to(dtype).t() @ a.to(dtype)


@torch.library.custom_op("lrlora_eager::sinc_weight", mutates_args=())
def sinc_weight(
    weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``W + scaling * phi(b^T a)``, ``[N, K]`` in ``dtype``, for a ``[R, K]``, b ``[R, N]`` and c ``[2n + 1]``."""
    phi = _product(a, b, weight)
    basis = _Basis(c, grid, phi)
    for z in basis.tiles(phi):
        basis.value(z)
    return torch.add(weight, phi, alpha=scaling).to(dtype)


@sinc_weight.register_fake
def _fake_weight(
    weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("lrlora_eager::sinc_gradients", mutates_args=("m",))
def sinc_gradients(
    m: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contracts ``m = dy^T x`` ``[N, K]`` into d_a ``[R, K]``, d_b ``[R, N]`` and d_c ``[2n + 1]``, in fp32 or fp64.

    m itself becomes ``W + scaling * phi(b^T a)`` if ``weight`` is given, and is used up otherwise.
    """
    phi = _product(a, b, m)
    basis, d_z, d_c = _Basis(c, grid, phi), m.to(phi.dtype), torch.zeros_like(c, dtype=phi.dtype)
    for z, d in zip(basis.tiles(phi), basis.tiles(d_z), strict=True):
        basis.differentiate(z, d, d_c)
    d_a, d_b = b.to(d_z.dtype) @ d_z, a.to(d_z.dtype) @ d_z.t()
    if weight is not None:
        m.copy_(torch.add(weight, phi, alpha=scaling))
    return d_a.mul_(scaling), d_b.mul_(scaling), d_c.mul_(scaling)


@sinc_gradients.register_fake
def _fake_gradients(
    m: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float
) -> tuple[Tensor, ...]:
    sums = torch.promote_types(m.dtype, torch.float32)
    return tuple(t.new_empty(t.shape, dtype=sums) for t in (a, b, c))
