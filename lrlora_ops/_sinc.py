"""sinc_weight and sinc_gradients in PyTorch: what CPU tensors run on, in tiles that stay in the caches.

With ``w = z / h``, m the nearest integer, ``f = w - m`` and the quotients ``q_k = f / (w - k)``, one sine serves all k:

    sinc(w - k)  = (-1)^(m - k) sinc(f) q_k
    sinc'(w - k) = (-1)^(m - k) (sinc(f) / f (q_k - q_k^2) + sinc'(f) q_k)

Where k = m, q_k is 1 to the bit if f is not zero, so that nothing cancels at ``w = k`` or near it. sinc'(f) is odd and
smooth on ``|f| <= 1/2``: its series is short, and ``1 - sinc(f) = f sinc'(f) + 2 sin(pi f / 2)^2`` is accurate near 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The least |f|, large enough for the square of a quotient.
_LEAST = 2.0**-60
# Of all buffers, for each thread: smaller ones would stay in a core's L2, but a call of PyTorch costs more than that.
# More threads than four share what four have: 16 MB in fp32.
_ELEMENTS, _MOST_THREADS = 2**20, 4
_PLAIN = 8  # buffers of a number for each element, beside those of a number for each k


def _series(dtype: torch.dtype) -> list[float]:
    """Coefficients of sinc'(f) / f in powers of f^2, as many as the dtype can tell."""
    terms = range(1, 14 if dtype == torch.float64 else 7)
    return [(-1) ** j * math.pi ** (2 * j) * 2 * j / math.factorial(2 * j + 1) for j in terms]


class _Basis:
    """The sinc functions on one tile after another, in buffers that are allocated once."""

    def __init__(self, coefficients: Tensor, grid: float, like: Tensor) -> None:
        count = len(coefficients)
        self.reach, self.grid = count // 2, grid
        self.centres = torch.arange(-self.reach, self.reach + 1, dtype=like.dtype, device=like.device)[:, None]
        self.signs = (1 - 2 * (self.centres[:, 0] % 2)).to(like.dtype)
        self.c0, self.signed = float(coefficients[self.reach]), coefficients.to(like.dtype) * self.signs
        self.series = [like.new_tensor(value) for value in _series(like.dtype)]
        self.one = like.new_ones(())
        self.size = max(1, _ELEMENTS // (count + _PLAIN)) * min(torch.get_num_threads(), _MOST_THREADS)
        self.buffers = like.new_empty(count + _PLAIN, min(self.size, like.numel()))

    def tiles(self, values: Tensor) -> tuple[Tensor, ...]:
        """A contiguous tensor in pieces that the buffers are for."""
        return values.view(-1).split(self.size)

    def _locate(self, z: Tensor) -> None:
        """w, m, f, and ``(-1)^m`` as sign, of the elements of a tile; w is an ulp at least away from every k."""
        n = z.numel()
        buffers = self.buffers.view(-1)[: len(self.buffers) * n].view(len(self.buffers), n)
        self.w, self.m, self.f, self.sign, self.s, self.t, self.u, self.v = buffers[:_PLAIN]
        self.q = buffers[_PLAIN:]
        torch.mul(z, 1 / self.grid, out=self.w)
        torch.round(self.w, out=self.m)
        torch.sub(self.w, self.m, out=self.f)
        if n and torch.abs(self.f, out=self.s).amin() < _LEAST:
            centres = torch.abs(self.m, out=self.s).clamp_(max=self.reach)
            ulps = centres.mul_(2 * torch.finfo(z.dtype).eps).add_(_LEAST)
            torch.sub(self.w.add_(torch.copysign(ulps, self.f)), self.m, out=self.f)
            self.f.masked_fill_(self.f == 0, _LEAST)  # of a w so large that an ulp is nothing
        odd = torch.mul(self.m, 0.5, out=self.s).frac_()  # 0 or a half
        torch.addcmul(self.one, odd, odd, value=-8, out=self.sign)

    def _divide(self, numerator: Tensor) -> Tensor:
        """``numerator / (w - k)``, a row for each k."""
        return torch.div(numerator, torch.sub(self.w, self.centres, out=self.q), out=self.q)

    def value(self, z: Tensor) -> None:
        """phi(z) in the place of z."""
        self._locate(z)
        sine = torch.mul(self.f, math.pi, out=self.s).sin_().mul_(self.sign)
        z.sub_(self.c0).addmv_(self._divide(sine).t(), self.signed, alpha=1 / math.pi)

    def differentiate(self, z: Tensor, d: Tensor, d_c: Tensor) -> None:
        """phi(z) in the place of z, ``d phi'(z)`` in that of d, and ``sum d (psi_k(z) - psi_k(0))`` added to d_c."""
        self._locate(z)
        square = torch.mul(self.f, self.f, out=self.s)
        torch.addcmul(self.series[-2], square, self.series[-1], out=self.t)
        for coefficient in self.series[-3::-1]:
            torch.addcmul(coefficient, self.t, square, out=self.t)
        slope = self.t.mul_(self.f)  # sinc'(f)
        half = torch.mul(self.f, math.pi / 2, out=self.u).sin_()
        drop = torch.mul(self.f, slope, out=self.s).addcmul_(half, half, value=2)  # 1 - sinc(f)
        sinc = torch.sub(self.one, drop, out=self.u).mul_(self.sign)
        q, d_sinc = self._divide(self.f), torch.mul(d, sinc, out=self.v)
        sums = torch.mv(q, d_sinc).mul_(self.signs)
        # sum d (psi_0(z) - 1) would cancel where z is small.
        sums[self.reach] = torch.dot(d_sinc, q[self.reach] - self.sign) - torch.dot(d, drop)
        d_c += sums
        p = torch.mv(q.t(), self.signed, out=self.s)
        z.sub_(self.c0).addcmul_(sinc, p)
        slope.mul_(p).mul_(self.sign)
        bent = torch.mv(q.addcmul_(q, q, value=-1).t(), self.signed, out=self.s)
        slope.addcmul_(sinc.div_(self.f), bent)
        d.addcmul_(d, slope, value=1 / self.grid)


def _product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``b^T a``, in fp32 or, for fp64, that."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return b.to(dtype).t() @ a.to(dtype)


def sinc_weight(
    weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``W + scaling * phi(b^T a)``, ``[N, K]`` in ``dtype``, for a ``[R, K]``, b ``[R, N]`` and c ``[2n + 1]``."""
    phi = _product(a, b, weight)
    basis = _Basis(c, grid, phi)
    for z in basis.tiles(phi):
        basis.value(z)
    return torch.add(weight, phi, alpha=scaling, out=phi).to(dtype)


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
        torch.add(weight, phi, alpha=scaling, out=m)
    return d_a.mul_(scaling), d_b.mul_(scaling), d_c.mul_(scaling)
