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
        a = load_factor(a_ptr, rank, offs_r, offs_k, mask_k, num_cols, dtype)
        b = load_factor(b_ptr, rank, offs_r, offs_n, mask_n, num_rows, dtype)
        z = tl.dot(tl.trans(b), a, z, input_precision=PRECISION)
    return z


@triton.jit
def load_factor(
    ptr,  # [R, size]
    rank,
    offs_r,
    offs,
    mask,
    size,
    dtype: tl.constexpr,
):
    """A tile ``[len(offs_r), len(offs)]`` of a or b in ``dtype``, zero beyond the rank."""
    rows = offs_r.to(tl.int64)[:, None]
    mask = (offs_r < rank)[:, None] & mask[None, :]
    return tl.load(ptr + rows * size + offs[None, :], mask=mask, other=0.0).to(dtype)
