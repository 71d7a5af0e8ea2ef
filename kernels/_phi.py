"""Device helpers of the sinc kernels: phi, for any w and any number of coefficients.

With m the integer nearest to ``w = z / h``, ``f = w - m`` and ``r_k = 1 / (m - k + f)``, one sine serves all k:

    psi_k  = (-1)^(m - k) f sinc(f) r_k
    psi_k' = (-1)^(m - k) (sinc(f) (m - k) r_k^2 + f^2 g(f) r_k) / h              g(f) = (cos(pi f) - sinc(f)) / f^2

Neither cancels near ``w = k`` if f is kept off zero, where ``f r_k = 1`` and ``(m - k) r_k^2 = 0``. On ``|f| <= 1/2``
sinc and g are short series, the same on every GPU.
"""

import math

import triton
import triton.language as tl

# The least |f|: a power of two, so that f (1 / f) is 1 to the bit, and large enough for 1 / f^2.
_LEAST = tl.constexpr(2.0**-60)
# sinc(f) - 1 and cos(pi f) - sinc(f), over f^2 and in powers of it.
_SINC = [(-1) ** j * math.pi ** (2 * j) / math.factorial(2 * j + 1) for j in range(1, 8)]
_SINC_TERMS = tl.constexpr(tuple(_SINC))
_COSINE_TERMS = tl.constexpr(tuple(2 * (j + 1) * term for j, term in enumerate(_SINC)))


@triton.jit
def polynomial(x, coefficients, COUNT: tl.constexpr):
    """``sum_j coefficients[j] x^j``."""
    total = tl.zeros_like(x) + coefficients[COUNT - 1]
    for j in tl.static_range(COUNT - 2, -1, -1):
        total = total * x + coefficients[j]
    return total


@triton.jit
def sinc_below_one(f):
    """``sinc(f) - 1`` for ``|f| <= 1/2``, by its series."""
    square = f * f
    return square * polynomial(square, _SINC_TERMS, 7)


@triton.jit
def cosine_below_sinc(f):
    """``cos(pi f) - sinc(f)`` for ``|f| <= 1/2``, by its series: the difference would cancel."""
    square = f * f
    return square * polynomial(square, _COSINE_TERMS, 7)


@triton.jit
def locate(w):
    """m, f, and ``(-1)^m``, for ``w = m + f``."""
    m = tl.floor(w + 0.5)
    f = w - m
    f = tl.where(tl.abs(f) < _LEAST, _LEAST, f)
    half = m * 0.5
    return m, f, 1.0 - 4.0 * (half - tl.floor(half))


@triton.jit
def _signed(index, reach):
    """``(-1)^k`` for ``k = index - reach``."""
    return 1.0 - 2.0 * ((index + reach) % 2)


@triton.jit
def psi_sum(
    w,
    c_ptr,  # [2 reach + 1] fp32
    reach,
):
    """``sum_k c_k psi_k(w)``."""
    m, f, sign = locate(w)
    p = tl.zeros_like(w)
    for index in range(0, 2 * reach + 1):
        p += _signed(index, reach) * tl.load(c_ptr + index) / (m - (index - reach) + f)
    return sign * f * (1.0 + sinc_below_one(f)) * p


@triton.jit
def psi_gradients(
    w,
    d,
    c_ptr,  # [2 reach + 1] fp32
    reach,
    d_c,  # [rows, BLOCK_C]
    BLOCK_C: tl.constexpr,
):
    """``sum_k c_k psi_k(w)``, its derivative by w, and d_c plus ``sum d (psi_k(w) - psi_k(0))`` of each row and k."""
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    m, f, sign = locate(w)
    below_one = sinc_below_one(f)
    sinc = sign * (1.0 + below_one)
    d_sine = d * f * sinc
    centre = tl.where(m == 0, d * below_one, d_sine / (m + f) - d)  # would cancel where w is small
    d_c += tl.where(offs_c == reach, tl.sum(centre, 1)[:, None], 0.0)
    p, t = tl.zeros_like(w), tl.zeros_like(w)
    for index in range(0, 2 * reach + 1):  # not unrolled: that would hold the tiles of all k at once
        c = _signed(index, reach) * tl.load(c_ptr + index)
        distance = m - (index - reach)
        r = 1.0 / (distance + f)
        p += c * r
        t += c * (distance * r) * r
        total = _signed(index, reach) * tl.sum(d_sine * r, 1)[:, None]
        d_c += tl.where((offs_c == index) & (index != reach), total, 0.0)
    return sinc * f * p, sinc * t + sign * cosine_below_sinc(f) * p, d_c
