"""dropout: ``keep * x / (1 - p)`` with a mask that is a function of (seed, row, column) and is never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._tiles import row_major

_BLOCK_M, _BLOCK_K = 16, 256


@triton.jit(do_not_specialize=["num_rows"])
def dropout_kernel(
    x_ptr,  # [M, K]
    out_ptr,  # [M, K], output
    seed_ptr,  # [] int64
    num_rows,
    num_cols,
    stride_xm,
    p,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_M rows by BLOCK_K columns; one random draw serves four. Grid: (row tiles, column tiles)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m < num_rows)[:, None] & (offs_k < num_cols)[None, :]
    offs_quad = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 4), dtype=tl.uint32)
    row = zero + offs_m.to(tl.uint32)[:, None]
    quad = zero + offs_quad.to(tl.uint32)[None, :]
    random_0, random_1, random_2, random_3 = tl.philox(tl.load(seed_ptr), quad, row, zero, zero)
    random = tl.join(tl.join(random_0, random_2), tl.join(random_1, random_3)).reshape(BLOCK_M, BLOCK_K)
    keep = tl.uint_to_uniform_float(random) >= p

    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
    out = tl.where(keep, x.to(tl.float32) * (1 / (1 - p)), 0.0)
    offs = offs_m.to(tl.int64)[:, None] * num_cols + offs_k[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("lrlora_triton::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x ``[M, K]`` with each element dropped with probability ``p``; ``seed`` is int64 ``[]``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    x = row_major(x)
    grid = (triton.cdiv(x.shape[0], _BLOCK_M), triton.cdiv(x.shape[1], _BLOCK_K))
    dropout_kernel[grid](
        x,
        out,
        seed,
        x.shape[0],
        x.shape[1],
        x.stride(0),
        p,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        enable_fp_fusion=True,
    )
    return out


@dropout.register_fake
def _(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
