"""phi of nine coefficients at most: sums over powers of w in the place of sums over k, without a division for each k.

With 2n + 1 coefficients, n up to 4,

    psi_k(w) = E(w) L_k(w)    L_k(w) = (-1)^(k + n) prod_{|i| <= n, i != k} (w - i) / n!^2
    E(w) = sin(pi w) / (pi w prod_{0 < i <= n} (1 - w^2 / i^2)) = prod_{i > n} (1 - w^2 / i^2)

E is one function for all k. Where ``|w| <= 9/2`` it is smooth, though its first form divides 0 by 0 there: the factors
of the last form up to i = 6, times 2 to the power of a polynomial in w^2. Further out the first form divides by nothing
near 0: its product is a polynomial in ``w^2 - n^2`` whose coefficients have one sign.
"""

import math

import triton
import triton.language as tl
from numpy.polynomial import Chebyshev, Polynomial

from lrlora_ops.kernels._phi import polynomial

NINE = 9
# w^2 of the last w that E's last form is for.
_INNER = tl.constexpr(20.25)
# |w| counts as this at most in L_k and in the product below E, whose powers would overflow; their ratio, a polynomial
# over another of its degree, no longer changes there.
_MOST = tl.constexpr(1e4)
# log2 of prod_{i > 6} (1 - w^2 / i^2), over w^2 and in powers of it: minimax, within 5e-8 where |w| <= 9/2.
_LOG = (-0.221519019, -8.65219172e-4, -8.12574184e-6, -8.59869923e-8, -2.75672508e-9, 4.59703455e-11, -1.92541569e-12)
_LOG_TERMS = tl.constexpr(_LOG)
# Twice that log2 derived by w^2, as a natural logarithm.
_SLOPE_TERMS = tl.constexpr(tuple(2 * (j + 1) * math.log(2) * term for j, term in enumerate(_LOG)))
# sin(pi f) / f and pi cos(pi f) in powers of f^2: minimax, within 6e-9 and 7e-10 where |f| <= 1/2.
_SINE_TERMS = tl.constexpr((3.14159264, -5.16770968, 2.55006973, -0.59824213, 0.07756039))
_COSINE = (1.0, -4.93480214, 4.05870916, -1.33521206, 0.23493756, -0.02439672)
_COSINE_TERMS = tl.constexpr(tuple(math.pi * term for term in _COSINE))
# 1.5 * 2^23: a number below 2^22 that it is added to loses its fraction, and its last bit says whether it is odd.
_ROUNDS = tl.constexpr(12582912.0)


def _lagrange(k: int, n: int) -> Polynomial:
    """L_k."""
    product = Polynomial([(-1.0) ** (k + n) / math.factorial(n) ** 2])
    for i in {*range(-n, n + 1)} - {k}:
        product *= Polynomial([-i, 1])
    return product


def _powers(n: int) -> tuple[float, ...]:
    """The coefficient of w^j in L_k, one k after another for each j."""
    columns = zip(*(map(float, _lagrange(k, n).coef) for k in range(-n, n + 1)), strict=True)
    return tuple(coefficient for column in columns for coefficient in column)


def _far_product(n: int) -> Polynomial:
    """``pi prod_{0 < i <= n} (1 - w^2 / i^2)`` as a polynomial in ``t = w^2 - n^2``."""
    product = Polynomial([math.pi])
    for i in range(1, n + 1):
        product *= Polynomial([i * i - n * n, -1]) / (i * i)
    return product


def _far_slope(n: int) -> Polynomial:
    """w times that product, derived by w, in t."""
    product = _far_product(n)
    return product + 2 * Polynomial([n * n, 1]) * product.deriv()


def _excess(n: int) -> Polynomial:
    """``(E - 1) / w^2`` in powers of w^2, within 1e-7 of itself where ``|w| <= 1/2``."""
    sinc = [(-1) ** j * math.pi ** (2 * j) / math.factorial(2 * j + 1) for j in range(16)]
    for i in range(1, n + 1):  # divided by 1 - w^2 / i^2
        for j in range(1, 16):
            sinc[j] += sinc[j - 1] / (i * i)
    return Chebyshev.interpolate(Polynomial(sinc[1:]), 3, (0, 0.25)).convert(kind=Polynomial)


# For each n.
_POWERS = tl.constexpr(tuple(map(_powers, range(5))))
_FAR, _FAR_SLOPE, _EXCESS = (
    tl.constexpr(tuple(tuple(map(float, make(n).coef)) for n in range(5)))
    for make in (_far_product, _far_slope, _excess)
)


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
def _near_product(square, N: tl.constexpr):
    """``prod_{n < i <= 6} (1 - w^2 / i^2)``, and its derivative by w over 2 w."""
    product, slope = tl.zeros_like(square) + 1.0, tl.zeros_like(square)
    for i in tl.static_range(N + 1, 7):
        factor = 1.0 - square * (1.0 / (i * i))
        slope = slope * factor - product * (1.0 / (i * i))
        product *= factor
    return product, slope


@triton.jit
def _far_products(near, N: tl.constexpr):
    """``pi prod_{0 < i <= n} (1 - w^2 / i^2)`` where ``|w| >= 9/2``, and w times it, derived by w."""
    t = tl.maximum(near * near - N * N, _INNER - N * N)
    product, slope = tl.zeros_like(t) + _FAR[N][N], tl.zeros_like(t) + _FAR_SLOPE[N][N]
    for j in tl.static_range(N - 1, -1, -1):
        product = product * t + _FAR[N][j]
        slope = slope * t + _FAR_SLOPE[N][j]
    return product, slope


@triton.jit
def _locate(w):
    """``f = w - m`` with m the integer nearest to w, and the sign bit of ``(-1)^m``.

    Beyond 2^22, where psi_k is nothing any more, f is still bounded.
    """
    shifted = w + _ROUNDS
    return w - (shifted - _ROUNDS), shifted.to(tl.int32, bitcast=True) << 31


@triton.jit
def _signed(x, sign):
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def nine_sum(w, powers, N: tl.constexpr):
    """``sum_k c_k psi_k(w)``."""
    square, near = w * w, tl.minimum(tl.maximum(w, -_MOST), _MOST)
    factors, _ = _near_product(square, N)
    inner = factors * tl.exp2(square * polynomial(square, _LOG_TERMS, 7))
    f, sign = _locate(w)
    product, _ = _far_products(near, N)
    outer = _signed(f * polynomial(f * f, _SINE_TERMS, 5), sign) / (w * product)
    return tl.where(square <= _INNER, inner, outer) * polynomial(near, powers, 2 * N + 1)


@triton.jit
def nine_gradients(w, d, powers, moments, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``sum_k c_k psi_k(w)``, its derivative by w, and the moments plus those of d.

    Moments are sums over ``d (E - 1)``, which would cancel where w is small if E were summed, and ``d E w^j``, j > 0.
    """
    square, near = w * w, tl.minimum(tl.maximum(w, -_MOST), _MOST)
    factors, factors_slope = _near_product(square, N)
    power = tl.exp2(square * polynomial(square, _LOG_TERMS, 7))
    inner_slope = factors * polynomial(square, _SLOPE_TERMS, 7) + 2.0 * factors_slope

    f, sign = _locate(w)
    product, product_slope = _far_products(near, N)
    inverse = 1.0 / (w * product)
    outer = _signed(f * polynomial(f * f, _SINE_TERMS, 5), sign) * inverse
    outer_slope = (_signed(polynomial(f * f, _COSINE_TERMS, 6), sign) - outer * product_slope) * inverse

    is_inner = square <= _INNER
    e = tl.where(is_inner, factors * power, outer)
    e_slope = tl.where(is_inner, inner_slope * (w * power), outer_slope)
    p, p_slope = tl.zeros_like(w) + powers[2 * N], tl.zeros_like(w)
    for j in tl.static_range(2 * N - 1, -1, -1):
        p_slope = p_slope * near + p
        p = p * near + powers[j]

    excess = tl.zeros_like(w) + _EXCESS[N][3]
    for j in tl.static_range(2, -1, -1):
        excess = excess * square + _EXCESS[N][j]
    sums = (moments[0] + _by_lane(d * tl.where(square <= 0.25, square * excess, e - 1.0), BLOCK_N, BLOCK_K),)
    term = d * e  # times w^4 after four powers: these are products that a sum can take in
    for j in tl.static_range(1, 2 * N + 1):
        power_of_w = near
        for _ in tl.static_range((j - 1) % 4):
            power_of_w = power_of_w * near
        sums = sums + (moments[j] + _by_lane(term * power_of_w, BLOCK_N, BLOCK_K),)
        if j % 4 == 0:
            term = term * power_of_w
    return e * p, e * p_slope + e_slope * p, sums


@triton.jit
def _by_lane(x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_N, 4]``: of each row the sums of the columns that a thread has of what NVIDIA's tensor cores compute."""
    columns = tl.reshape(x, (BLOCK_N, BLOCK_K // 8, 4, 2))
    return tl.sum(tl.sum(columns, 3), 1)


@triton.jit
def zero_moments(N: tl.constexpr, BLOCK_N: tl.constexpr):
    """What ``nine_gradients`` starts from."""
    moments = ()
    for _ in tl.static_range(2 * N + 1):
        moments = moments + (tl.zeros((BLOCK_N, 4), dtype=tl.float32),)
    return moments


@triton.jit
def of_coefficients(moments, N: tl.constexpr, BLOCK_C: tl.constexpr):
    """``sum d (psi_k(w) - psi_k(0))`` of every k, ``[BLOCK_C]``, from the sums of moments."""
    offs_c = tl.arange(0, BLOCK_C)
    totals = ()
    for j in tl.static_range(2 * N + 1):
        totals = totals + (tl.sum(moments[j]),)
    # psi_0 - 1 = (E - 1) + E (L_0 - 1), and L_k has no power 0 for another k.
    d_c = tl.where(offs_c == N, totals[0], 0.0)
    for index in tl.static_range(2 * N + 1):
        total = totals[0] * 0.0
        for j in tl.static_range(1, 2 * N + 1):
            total += totals[j] * _POWERS[N][j * (2 * N + 1) + index]
        d_c += tl.where(offs_c == index, total, 0.0)
    return d_c
