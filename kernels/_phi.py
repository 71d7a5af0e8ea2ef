"""Device helpers of the sinc kernels: tiles of the low-rank product, and the parts of phi that serve all k."""

import triton
import triton.language as tl

# The least |f|: a power of two, so that f (1 / f) is 1 to the bit, and large enough for 1 / f^2.
_LEAST = tl.constexpr(2.0**-60)
_PI_SQUARED = tl.constexpr(9.869604401089358)


@triton.jit
def low_rank_tile(
    a_ptr,  # [R, K]
    b_ptr,  # [R, N]
    rank,
    offs_n,
    mask_n,
    offs_k,
    mask_k,
    num_rows,
    num_cols,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``sum_j b[j, n] a[j, k]`` in fp32, of factors in ``dtype``."""
    z = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        a, b = load_factors(a_ptr, b_ptr, rank, offs_r, offs_n, mask_n, offs_k, mask_k, num_rows, num_cols, dtype)
        z = tl.dot(tl.trans(b), a, z, input_precision=PRECISION)
    return z


@triton.jit
def load_factors(
    a_ptr,  # [R, K]
    b_ptr,  # [R, N]
    rank,
    offs_r,
    offs_n,
    mask_n,
    offs_k,
    mask_k,
    num_rows,
    num_cols,
    dtype: tl.constexpr,
):
    """a ``[BLOCK_R, BLOCK_K]`` and b ``[BLOCK_R, BLOCK_N]`` in ``dtype``, zero beyond the rank."""
    mask_r = offs_r < rank
    rows = offs_r.to(tl.int64)[:, None]
    a = tl.load(a_ptr + rows * num_cols + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
    b = tl.load(b_ptr + rows * num_rows + offs_n[None, :], mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    return a.to(dtype), b.to(dtype)


@triton.jit
def locate(z, inverse_grid):
    """m, f, and ``(-1)^m``, for ``w = z / h = m + f``."""
    w = z * inverse_grid
    m = tl.floor(w + 0.5)
    f = w - m
    f = tl.where(tl.abs(f) < _LEAST, _LEAST, f)
    return m, f, parity(m)


@triton.jit
def parity(m):
    """``(-1)^m``."""
    half = m * 0.5
    return 1.0 - 4.0 * (half - tl.floor(half))


@triton.jit
def signed(index, reach):
    """``(-1)^k`` for ``k = index - reach``."""
    return 1.0 - 2.0 * ((index + reach) % 2)


@triton.jit
def sinc_below_one(f):
    """``sinc(f) - 1`` for ``|f| <= 1/2``, by its series."""
    x = f * f * _PI_SQUARED
    tail = x * 0.0 + 1.0
    for j in tl.static_range(7, 1, -1):
        tail = 1.0 - x * tail * (1.0 / (2 * j * (2 * j + 1)))
    return -x * tail * (1.0 / 6.0)


@triton.jit
def cosine_below_sinc(f):
    """``cos(pi f) - sinc(f)`` for ``|f| <= 1/2``, by its series: the difference would cancel."""
    x = f * f * _PI_SQUARED
    tail = x * 0.0 + 1.0
    for j in tl.static_range(6, 0, -1):
        tail = 1.0 - x * tail * (1.0 / (2 * j * (2 * j + 3)))
    return -x * tail * (1.0 / 3.0)
