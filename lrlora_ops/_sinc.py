"""sinc_weight and sinc_gradients in PyTorch: what CPU tensors run on, in tiles that stay in the caches.

With ``w = z / h``, m the nearest integer, ``f = w - m`` and the quotients ``q_k = f / (w - k)``, one sine serves all k:

    sinc(w - k)  = (-1)^(m - k) sinc(f) q_k
    sinc'(w - k) = (-1)^(m - k) (sinc(f) / f (q_k - q_k^2) + sinc'(f) q_k)

Where k = m, q_k is 1 to the bit if f is not zero, so that nothing cancels at ``w = k`` or near it. sinc'(f) is odd and
smooth on ``|f| <= 1/2``: its series is short, and ``1 - sinc(f) = f sinc'(f) + 2 sin(pi f / 2)^2`` is accurate near 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# The least |f|, large enough for the square of a quotient.
_LEAST = 2.0**-60
# Of all buffers, for each thread, 4 MB in fp32: smaller ones would stay in a core's L2, but a call of PyTorch costs
# more than that. More threads than four share what four have.
_ELEMENTS, _MOST_THREADS = 2**20, 4
_PLAIN = 9  # buffers of a number for each element of a tile, beside that of a number for each k and element


def _series(dtype: torch.dtype) -> list[float]:
    """Coefficients of sinc'(f) / f in powers of f^2, as many as the dtype can tell."""
    terms = range(1, 14 if dtype == torch.float64 else 7)
    return [(-1) ** j * math.pi ** (2 * j) * 2 * j / math.factorial(2 * j + 1) for j in terms]


class _Basis:
    """The sinc functions on ``z = b a``, a tile of some of its rows at a time, in buffers that are allocated once.

    a is ``[R, K]`` and b ``[N, R]``, in the dtype that all is computed in. The elements of a tile are
    ``[shares, 1, size]``, and what there is for each k ``[shares, 2n + 1, size]``: a share stays with one thread, and
    in its core's cache, whatever is computed.
    """

    def __init__(self, a: Tensor, b: Tensor, coefficients: Tensor, grid: float) -> None:
        self.a, self.b, self.grid = a, b / grid, grid
        self.count = len(coefficients)
        self.reach = self.count // 2
        self.centres = torch.arange(-self.reach, self.reach + 1, dtype=a.dtype, device=a.device)[:, None]
        self.signs = 1 - 2 * (self.centres[:, 0] % 2)
        c = coefficients.to(a.dtype)
        self.offset, self.signed = -c[self.reach], c * self.signs
        self.series = [a.new_tensor(value) for value in _series(a.dtype)]
        self.one = a.new_ones(())
        self.sums, self.central = a.new_zeros(self.count), a.new_zeros(())  # see ``differentiate``
        num_cols, self.threads = max(1, a.shape[1]), torch.get_num_threads()
        size = _ELEMENTS // (_PLAIN + self.count) * min(self.threads, _MOST_THREADS)
        self.rows = max(1, min(size // num_cols, len(b)))
        self.buffers = a.new_empty(_PLAIN + self.count, self.rows * num_cols)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and what becomes phi(z) of them: where there are elements."""
        num_cols = self.a.shape[1]
        for first in range(0, len(self.b) if num_cols else 0, self.rows):
            b = self.b[first : first + self.rows]
            size = len(b) * num_cols
            shares = math.gcd(size, self.threads)
            plain = self.buffers[:_PLAIN, :size].view(_PLAIN, shares, 1, -1)
            self.phi, self.w, self.m, self.f, self.sign, self.s, self.t, self.u, self.v = plain.unbind()
            self.q = self.buffers[_PLAIN:].view(-1)[: self.count * size].view(shares, self.count, -1)
            self.weights = self.signed.expand(shares, 1, -1)
            torch.mm(b, self.a, out=self.w.view(len(b), num_cols))
            yield slice(first, first + len(b)), self.phi.view(len(b), num_cols)

    def _locate(self) -> None:
        """m, f, ``f^2`` as s, ``(-1)^m`` as sign, ``z - c_0`` as phi; w is then an ulp at least away from every k."""
        torch.add(self.offset, self.w, alpha=self.grid, out=self.phi)
        torch.round(self.w, out=self.m)
        torch.sub(self.w, self.m, out=self.f)
        if torch.mul(self.f, self.f, out=self.s).amin() < _LEAST**2:
            centres = torch.abs(self.m, out=self.t).clamp_(max=self.reach)
            ulps = centres.mul_(2 * torch.finfo(self.w.dtype).eps).add_(_LEAST)
            torch.sub(self.w.add_(torch.copysign(ulps, self.f)), self.m, out=self.f)
            self.f.masked_fill_(self.f == 0, _LEAST)  # of a w so large that an ulp is nothing
            torch.mul(self.f, self.f, out=self.s)
        odd = torch.mul(self.m, 0.5, out=self.t).frac_()  # 0 or a half
        torch.addcmul(self.one, odd, odd, value=-8, out=self.sign)

    def _divide(self, numerator: Tensor) -> Tensor:
        """``numerator / (w - k)``, a row for each k."""
        return torch.div(numerator, torch.sub(self.w, self.centres, out=self.q), out=self.q)

    def value(self) -> None:
        """phi(z)"""
        self._locate()
        sine = torch.mul(self.f, math.pi, out=self.s).sin_().mul_(self.sign)
        self.phi.baddbmm_(self.weights, self._divide(sine), alpha=1 / math.pi)

    def differentiate(self, d: Tensor) -> None:
        """phi(z), ``d phi'(z)`` in the place of d, and ``sum d (psi_k(z) - psi_k(0))`` added to what
        ``of_coefficients`` gives."""
        d = d.view(self.phi.shape)
        self._locate()
        square = self.s
        torch.mul(square, self.series[-1], out=self.t).add_(self.series[-2])
        for coefficient in self.series[-3::-1]:
            torch.addcmul(coefficient, self.t, square, out=self.t)
        slope = self.t.mul_(self.f)  # sinc'(f)
        half = torch.mul(self.f, math.pi / 2, out=self.u).sin_()
        drop = torch.mul(self.f, slope, out=self.s).addcmul_(half, half, value=2)  # 1 - sinc(f)
        sinc = torch.sub(self.one, drop, out=self.u).mul_(self.sign)
        self.central -= torch.dot(d.view(-1), drop.view(-1))

        q, d_sinc = self._divide(self.f), torch.mul(d, sinc, out=self.v)
        self.sums += torch.bmm(d_sinc, q.transpose(1, 2)).sum((0, 1))
        excess = torch.sub(q[:, self.reach, None], self.sign, out=self.s)
        self.central += torch.dot(d_sinc.view(-1), excess.view(-1))
        p = torch.bmm(self.weights, q, out=self.m)
        self.phi.addcmul_(sinc, p)
        slope.mul_(p).mul_(self.sign)
        bent = torch.bmm(self.weights, q.addcmul_(q, q, value=-1), out=self.s)
        slope.addcmul_(sinc.div_(self.f), bent)
        d.addcmul_(d, slope, value=1 / self.grid)

    def of_coefficients(self) -> Tensor:
        """The sums over all tiles that were differentiated, ``[2n + 1]``."""
        sums = self.sums * self.signs
        sums[self.reach] = self.central  # that of d (psi_0(z) - 1) would cancel where z is small
        return sums


def sinc_weight(
    weight: Tensor, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``W + scaling * phi(b^T a)``, ``[N, K]`` in ``dtype``, for a ``[R, K]``, b ``[R, N]`` and c ``[2n + 1]``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = weight.new_empty(weight.shape, dtype=dtype)
    basis = _Basis(a.to(wide), b.to(wide).t(), c, grid)
    for rows, z in basis.tiles():
        basis.value()
        torch.add(weight[rows], z, alpha=scaling, out=out[rows])
    return out


def sinc_gradients(
    m: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, c: Tensor, grid: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contracts ``m = dy^T x`` ``[N, K]`` into d_a ``[R, K]``, d_b ``[R, N]`` and d_c ``[2n + 1]``, in fp32 or fp64.

    m itself becomes ``W + scaling * phi(b^T a)`` if ``weight`` is given, and is used up otherwise.
    """
    wide = torch.promote_types(m.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    d_a, d_b, basis = torch.zeros_like(a), torch.zeros_like(b), _Basis(a, b.t(), c, grid)
    for rows, z in basis.tiles():
        d_z = m[rows].to(wide)
        basis.differentiate(d_z)
        d_a.addmm_(b[:, rows], d_z)
        torch.mm(a, d_z.t(), out=d_b[:, rows])
        if weight is not None:
            torch.add(weight[rows], z, alpha=scaling, out=m[rows])
    return d_a.mul_(scaling), d_b.mul_(scaling), basis.of_coefficients().mul_(scaling)
