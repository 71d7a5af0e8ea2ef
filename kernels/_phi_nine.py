"""phi of nine coefficients at most: sums over powers of w in the place of sums over k, without a division for each k.

With 2n + 1 coefficients, n up to 4,

    psi_k(w) = E(w) L_k(w)    L_k(w) = (-1)^(k + n) prod_{|i| <= n, i != k} (w - i) / n!^2
    E(w) = sin(pi w) / (pi w prod_{0 < i <= n} (1 - w^2 / i^2)) = prod_{i > n} (1 - w^2 / i^2)

E is one function for all k. Where ``|w| <= 9/2`` it is smooth, though its first form divides 0 by 0 there: the factors
of the last form up to i = 6, times 2 to the power of a polynomial in w^2. Further out the first form divides by nothing
near 0; with m the integer nearest to w and ``f = w - m``, ``sin(pi w) = (-1)^m sin(pi f)``.
"""

import math

import triton
import triton.language as tl

from lrlora_ops.kernels._phi import cosine_below_sinc, locate, polynomial, sinc_below_one

NINE = 9
# w^2 of the last w that the polynomial is for.
_INNER = tl.constexpr(20.25)
# |w| counts as this at most in L_k and in the product below E, whose powers would overflow; their ratio, a polynomial
# over another of its degree, no longer changes there.
_MOST = tl.constexpr(1e4)
# Moments that are summed over rows of a tile at once; those of the others, by place, take fewer instructions, and more
# registers than there are for all of them.
_BY_ROW = tl.constexpr(6)
# log2 of prod_{i > 6} (1 - w^2 / i^2), over w^2 and in powers of it: minimax, within 5e-8 where |w| <= 9/2.
_LOG = (-0.221519019, -8.65219172e-4, -8.12574184e-6, -8.59869923e-8, -2.75672508e-9, 4.59703455e-11, -1.92541569e-12)
_LOG_TERMS = tl.constexpr(_LOG)
# That log2 derived by w^2, as a natural logarithm.
_SLOPE_TERMS = tl.constexpr(tuple((j + 1) * math.log(2) * term for j, term in enumerate(_LOG)))


def _powers(n: int) -> tuple[float, ...]:
    """The coefficient of w^j in L_k, one k after another for each j."""
    polynomials = []
    for k in range(-n, n + 1):
        coefficients = [(-1.0) ** (k + n) / math.factorial(n) ** 2]
        for i in set(range(-n, n + 1)) - {k}:
            shifted, scaled = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [up - i * own for up, own in zip(shifted, scaled, strict=True)]
        polynomials.append(coefficients)
    return tuple(coefficient for row in zip(*polynomials, strict=True) for coefficient in row)


# For each n.
_POWERS = tl.constexpr(tuple(map(_powers, range(5))))


@triton.jit
def power_coefficients(
    c_ptr,  # [2 n + 1] fp32
    N: tl.constexpr,
):
    """``sum_k c_k L_k(w)`` as a coefficient for each power of w."""
    c = ()
    for index in tl.static_range(2 * N + 1):
        c = c + (tl.load(c_ptr + index),)
    sums = ()
    for j in tl.static_range(2 * N + 1):
        total = c[0] * _POWERS[N][j * (2 * N + 1)]
        for index in tl.static_range(1, 2 * N + 1):
            total += c[index] * _POWERS[N][j * (2 * N + 1) + index]
        sums = sums + (total,)
    return sums


@triton.jit
def _bounded(w):
    return tl.minimum(tl.maximum(w, -_MOST), _MOST)


@triton.jit
def _product(square, FIRST: tl.constexpr, LAST: tl.constexpr):
    """``prod_{FIRST <= i <= LAST} (1 - w^2 / i^2)``, and its derivative by w^2."""
    product, slope = tl.zeros_like(square) + 1.0, tl.zeros_like(square)
    for i in tl.static_range(FIRST, LAST + 1):
        factor = 1.0 - square * (1.0 / (i * i))
        slope = slope * factor - product * (1.0 / (i * i))
        product *= factor
    return product, slope


@triton.jit
def nine_sum(w, powers, N: tl.constexpr):
    """``sum_k c_k psi_k(w)``."""
    square, near = w * w, _bounded(w)
    factors, _ = _product(square, N + 1, 6)
    inner = factors * tl.exp2(square * polynomial(square, _LOG_TERMS, 7))
    _, f, sign = locate(w)
    product, _ = _product(tl.maximum(near * near, _INNER), 1, N)
    outer = sign * f * (1.0 + sinc_below_one(f)) / (w * product)
    return tl.where(square <= _INNER, inner, outer) * polynomial(near, powers, 2 * N + 1)


@triton.jit
def nine_gradients(w, d, powers, moments, N: tl.constexpr):
    """``sum_k c_k psi_k(w)``, its derivative by w, and the moments plus those of d.

    Moments are sums over ``d (psi_0(w) - 1)``, apart since it would cancel where w is small, and
    ``d E w^j``.
    """
    square, near = w * w, _bounded(w)
    factors, factors_slope = _product(square, N + 1, 6)
    power = tl.exp2(square * polynomial(square, _LOG_TERMS, 7))
    inner = factors * power
    inner_slope = inner * polynomial(square, _SLOPE_TERMS, 7) + power * factors_slope

    m, f, sign = locate(w)
    below_one = sinc_below_one(f)
    far = tl.maximum(near * near, _INNER)
    product, product_slope = _product(far, 1, N)
    inverse = 1.0 / (w * product)
    outer = sign * f * (1.0 + below_one) * inverse
    cosine = sign * (1.0 + below_one + cosine_below_sinc(f))
    outer_slope = (cosine - outer * (product + 2.0 * far * product_slope)) * inverse

    e = tl.where(square <= _INNER, inner, outer)
    e_slope = tl.where(square <= _INNER, 2.0 * w * inner_slope, outer_slope)
    p, p_slope = powers[0], 0.0
    if N > 0:
        slopes = ()
        for j in tl.static_range(1, 2 * N + 1):
            slopes = slopes + (powers[j] * j,)
        p, p_slope = polynomial(near, powers, 2 * N + 1), polynomial(near, slopes, 2 * N)

    even = ()  # coefficients of L_0
    for j in tl.static_range(N + 1):
        even = even + (_POWERS[N][2 * j * (2 * N + 1) + N],)
    central = tl.where(m == 0, below_one, e * polynomial(near * near, even, N + 1) - 1.0)
    sums = (moments[0] + tl.sum(d * central, 1),)
    term = d * e
    for j in tl.static_range(1, 2 * N + 1):
        term = term * near
        if j < _BY_ROW:
            sums = sums + (moments[j] + tl.sum(term, 1),)
        else:
            sums = sums + (moments[j] + term,)
    return e * p, e * p_slope + e_slope * p, sums


@triton.jit
def zero_moments(N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What ``nine_gradients`` starts from."""
    moments = ()
    for j in tl.static_range(2 * N + 1):
        if j < _BY_ROW:
            moments = moments + (tl.zeros((BLOCK_N,), dtype=tl.float32),)
        else:
            moments = moments + (tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32),)
    return moments


@triton.jit
def of_coefficients(moments, N: tl.constexpr, BLOCK_C: tl.constexpr):
    """``sum d (psi_k(w) - psi_k(0))`` of every k, ``[BLOCK_C]``, from the sums of moments."""
    offs_c = tl.arange(0, BLOCK_C)
    totals = ()
    for j in tl.static_range(2 * N + 1):
        totals = totals + (tl.sum(moments[j]),)
    d_c = tl.where(offs_c == N, totals[0], 0.0)
    for index in tl.static_range(2 * N + 1):
        if index != N:
            total = totals[1] * _POWERS[N][2 * N + 1 + index]
            for j in tl.static_range(2, 2 * N + 1):
                total += totals[j] * _POWERS[N][j * (2 * N + 1) + index]
            d_c += tl.where(offs_c == index, total, 0.0)
    return d_c
