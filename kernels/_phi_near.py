"""phi where ``|w| <= 9/2``, of nine coefficients at most: polynomials, without a division for each k.

    psi_k(w) = E(w) L_k(w)    L_k(w) = (-1)^k prod_{|i| <= 4, i != k} (w - i) / 4!^2
                              E(w) = 4!^2 / (Gamma(5 + w) Gamma(5 - w)) = prod_{i > 4} (1 - w^2 / i^2)

since ``sin(pi w) / pi = w prod_i (1 - w^2 / i^2)``. E is positive here and smooth: its first two factors, and 2 to the
power of a polynomial in w^2. Nothing is divided by what may be 0. Sums over k become sums over powers of w.
"""

import triton
import triton.language as tl

from lrlora_ops.kernels._phi import polynomial, sinc_below_one

LIMIT = tl.constexpr(4.5)
_REACH = 4
NEAR_COUNT = 2 * _REACH + 1
_COUNT, _MIDDLE = tl.constexpr(NEAR_COUNT), tl.constexpr(_REACH)


def _lagrange(k: int) -> list[float]:
    """Coefficients of L_k, the lowest first."""
    coefficients = [(-1.0) ** k / 576]
    for i in range(-_REACH, _REACH + 1):
        if i != k:
            coefficients = [up - i * own for up, own in zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)]
    return coefficients


# Of each power of w: its coefficient in each L_k.
_POWERS = tl.constexpr(tuple(zip(*map(_lagrange, range(-_REACH, _REACH + 1)), strict=True)))
# Of L_0, in powers of w^2.
_CENTRAL = tl.constexpr(tuple(_lagrange(0)[::2]))
# log2 of E without its first two factors, over w^2 and in powers of it: minimax, within 5e-8 where |w| <= 9/2.
_LOG = (-0.221519019, -8.65219172e-4, -8.12574184e-6, -8.59869923e-8, -2.75672508e-9, 4.59703455e-11, -1.92541569e-12)
_LOG_TERMS = tl.constexpr(_LOG)
# The same times w^2, derived by w^2, as a natural logarithm.
_SLOPE_TERMS = tl.constexpr(tuple((j + 1) * 0.6931471805599453 * term for j, term in enumerate(_LOG)))


@triton.jit
def power_coefficients(c_ptr, reach):
    """``sum_k c_k L_k(w)``, of ``c_ptr`` ``[2 reach + 1]``, as a coefficient for each power of w."""
    c = ()
    for index in tl.static_range(_COUNT):
        k = index - _MIDDLE
        c = c + (tl.load(c_ptr + reach + k, mask=(k <= reach) & (-k <= reach), other=0.0),)
    sums = ()
    for j in tl.static_range(_COUNT):
        total = c[0] * _POWERS[j][0]
        for index in tl.static_range(1, _COUNT):
            total += c[index] * _POWERS[j][index]
        sums = sums + (total,)
    return sums


@triton.jit
def _envelope(square):
    """E, as two factors: the one in front of the power of 2, and that."""
    front = (1.0 - square * (1.0 / 25)) * (1.0 - square * (1.0 / 36))
    return front, tl.exp2(square * polynomial(square, _LOG_TERMS, 7))


@triton.jit
def near_sum(w, powers):
    """``sum_k c_k psi_k(w)``."""
    front, power = _envelope(w * w)
    return front * power * polynomial(w, powers, _COUNT)


@triton.jit
def near_gradients(w, powers):
    """E, ``sum_k c_k psi_k(w)`` and its derivative by w."""
    square = w * w
    front, power = _envelope(square)
    p = polynomial(w, powers, _COUNT)
    slope = powers[_COUNT - 1] * (_COUNT - 1) * w + powers[_COUNT - 2] * (_COUNT - 2)
    for j in tl.static_range(_COUNT - 3, 0, -1):
        slope = slope * w + powers[j] * j
    front_slope = square * (2.0 / 900) - (1.0 / 25 + 1.0 / 36)
    half = power * (front * polynomial(square, _SLOPE_TERMS, 7) + front_slope)
    e = front * power
    return e, e * p, e * slope + 2.0 * w * half * p


@triton.jit
def zero_moments(BLOCK_N: tl.constexpr):
    """What ``add_moments`` starts from."""
    moments = ()
    for _ in tl.static_range(_COUNT):
        moments = moments + (tl.zeros((BLOCK_N,), dtype=tl.float32),)
    return moments


@triton.jit
def add_moments(moments, d, w, e):
    """Sums of each row over ``d (psi_0(w) - 1)``, apart since it would cancel where w is small, and ``d E w^j``."""
    square = w * w
    central = tl.where(square < 0.25, sinc_below_one(w), e * polynomial(square, _CENTRAL, 5) - 1.0)
    sums = (moments[0] + tl.sum(d * central, 1),)
    term = d * e
    for j in tl.static_range(1, _COUNT):
        term = term * w
        sums = sums + (moments[j] + tl.sum(term, 1),)
    return sums


@triton.jit
def add_coefficients(d_c, moments, reach, BLOCK_C: tl.constexpr):
    """Adds ``sum d (psi_k(w) - psi_k(0))`` of every k, from the sums of moments."""
    offs_c = tl.arange(0, BLOCK_C) - reach
    totals = ()
    for j in tl.static_range(_COUNT):
        totals = totals + (tl.sum(moments[j]),)
    d_c += tl.where(offs_c == 0, totals[0], 0.0)
    for index in tl.static_range(_COUNT):
        if index != _MIDDLE:
            total = totals[1] * _POWERS[1][index]
            for j in tl.static_range(2, _COUNT):
                total += totals[j] * _POWERS[j][index]
            d_c += tl.where(offs_c == index - _MIDDLE, total, 0.0)
    return d_c
