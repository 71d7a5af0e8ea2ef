"""Device helpers of the sinc kernels: tiles of the low-rank product ``Z = b^T a``, and of its factors."""

import triton
import triton.language as tl


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
