"""shrink: ``u[i, j] = <x[i], a[comp(e_i, j)]>``, zero beyond the rank of row i's expert.

Memory-bound: x is read once, u is 1/50 of it. The whole width of U is written, so that later kernels load it
without a mask on the rank (such a mask turns 16-byte loads into 2-byte ones).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._tiles import (
    dot_precision,
    locate_tile,
    padded_rank,
    pool_rows,
    row_major,
    row_tiles,
    source_rows,
    stores_end,
)


@triton.jit(do_not_specialize=["num_rows"])
def shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    u_ptr,  # [L, WIDTH], output
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    row_index_ptr,  # [L]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    stride_xm,
    WIDTH: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of BLOCK_M rows of one expert by BLOCK_R rank slots. Grid: (row tiles, rank tiles).

    The last expert's tiles go on to the last row, with zeros where its rows have ended.
    """
    expert, first, end = locate_tile(
        tl.program_id(0), group_offsets_ptr, num_rows, num_experts, GROUPED, BLOCK_M, BLOCK_E
    )
    end_of_stores = stores_end(expert, end, num_rows, num_experts)
    if first >= end_of_stores:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(ranks_ptr + expert)
    mask_r = offs_r < rank
    offs_k = tl.arange(0, BLOCK_K)

    x_rows = source_rows(row_index_ptr, offs_m, mask_m, HAS_INDEX) * stride_xm
    a_rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, HAS_TABLE) * num_cols
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    live_cols = tl.where((tl.program_id(1) * BLOCK_R < rank) & (first < end), num_cols, 0)
    for k in range(0, live_cols, BLOCK_K):
        mask_k = k + offs_k < num_cols
        x = tl.load(x_ptr + x_rows[:, None] + (k + offs_k)[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptr + a_rows[:, None] + (k + offs_k)[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(a.to(x.dtype)), acc, input_precision=PRECISION)

    u = u_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
    tl.store(u, acc.to(u_ptr.dtype.element_ty), mask=(offs_m < end_of_stores)[:, None])


@torch.library.custom_op("lrlora_triton::shrink", mutates_args=())
def shrink(
    x: Tensor,
    a: Tensor,
    ranks: Tensor,
    max_rank: int,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """U ``[L, padded_rank(max_rank)]`` in x's dtype, for x ``[M, K]`` and a ``[R, K]``.

    ``row_index`` ``[L]`` gathers rows of x; without it L is M. Rows that belong to no expert are zero.
    """
    x, a = row_major(x), a.contiguous()
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    width = padded_rank(max_rank)
    u = x.new_empty(num_rows, width)
    num_experts = ranks.shape[0]
    tile = tile_for("shrink", width, x.dtype, num_rows // num_experts, x.shape[1])
    grid = (row_tiles(num_rows, num_experts, tile.block_m), width // tile.block_r)
    if num_rows:
        shrink_kernel[grid](
            x,
            a,
            u,
            ranks,
            components,
            group_offsets,
            row_index,
            num_rows,
            x.shape[1],
            num_experts,
            max_rank,
            x.stride(0),
            WIDTH=width,
            HAS_TABLE=components is not None,
            GROUPED=group_offsets is not None,
            HAS_INDEX=row_index is not None,
            PRECISION=dot_precision(x.dtype),
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_n,
            BLOCK_R=tile.block_r,
            **tile.launch_options(),
        )
    return u


@shrink.register_fake
def _(x, a, ranks, max_rank, components=None, group_offsets=None, row_index=None):
    return x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], padded_rank(max_rank))
