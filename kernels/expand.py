"""expand: ``out[i] = base[i] + scaling * sum_j gate_j u[i, j] b[comp(e_i, j)]``.

Memory-bound: one write of the output tile, and one read of base; the loop runs over live rank tiles alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._tiles import dot_precision, locate_tile, pool_rows, row_major, row_tiles


@triton.jit
def low_rank_product(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    b_ptr,  # [R, N]
    gate_ptr,  # [R]
    components_ptr,  # [E, max_rank]
    expert,
    rank,
    offs_m,
    mask_m,
    offs_n,
    mask_n,
    num_cols,
    max_rank,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``sum_j gate_j u[i, j] b[comp(e, j)]`` in fp32 for rows ``offs_m`` of one expert and columns ``offs_n``."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rank
        rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, HAS_TABLE)
        u = tl.load(u_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :], mask=mask_m[:, None], other=0.0)
        b = tl.load(
            b_ptr + rows[:, None] * num_cols + offs_n[None, :], mask=mask_r[:, None] & mask_n[None, :], other=0.0
        )
        if HAS_GATE:
            b = b.to(tl.float32) * tl.load(gate_ptr + rows, mask=mask_r, other=0.0)[:, None]
        acc = tl.dot(u, b.to(u.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def expand_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    b_ptr,  # [R, N]
    gate_ptr,  # [R]
    base_ptr,  # [L, N]
    out_ptr,  # [L, N], output
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    stride_bm,
    scaling,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of BLOCK_M rows of one expert by BLOCK_N columns. Grid: (row tiles, column tiles)."""
    expert, first, end = locate_tile(
        tl.program_id(0), group_offsets_ptr, num_rows, num_experts, GROUPED, BLOCK_M, BLOCK_E
    )
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_cols
    rank = tl.load(ranks_ptr + expert)

    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BASE:  # first, to be on its way during the product
        base = tl.load(base_ptr + offs_m.to(tl.int64)[:, None] * stride_bm + offs_n[None, :], mask=mask, other=0.0)

    acc = low_rank_product(
        u_ptr,
        b_ptr,
        gate_ptr,
        components_ptr,
        expert,
        rank,
        offs_m,
        mask_m,
        offs_n,
        mask_n,
        num_cols,
        max_rank,
        WIDTH,
        HAS_GATE,
        HAS_TABLE,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    out = acc * scaling
    if HAS_BASE:
        out += base.to(tl.float32)
    offs = offs_m.to(tl.int64)[:, None] * num_cols + offs_n[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("lrlora_triton::expand", mutates_args=())
def expand(
    u: Tensor,
    b: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``base`` (or zero) plus the expansion of u ``[L, WIDTH]`` by b ``[R, N]``: ``[L, N]`` in base's dtype (or u's).

    Rows of no expert are zero.
    """
    base = None if base is None else row_major(base)
    like = u if base is None else base
    # Rows of no expert are in no tile.
    out = (like.new_empty if group_offsets is None else like.new_zeros)(u.shape[0], b.shape[1])
    if out.numel() == 0:
        return out
    num_rows, num_cols, num_experts = out.shape[0], out.shape[1], ranks.shape[0]
    tile = tile_for("expand", u.shape[1], u.dtype, num_rows // num_experts, num_cols)
    expand_kernel[row_tiles(num_rows, num_experts, tile.block_m), triton.cdiv(num_cols, tile.block_n)](
        u.contiguous(),
        b.contiguous(),
        gate,
        base,
        out,
        ranks,
        components,
        group_offsets,
        num_rows,
        num_cols,
        num_experts,
        0 if components is None else components.shape[1],
        0 if base is None else base.stride(0),
        scaling,
        WIDTH=u.shape[1],
        HAS_GATE=gate is not None,
        HAS_BASE=base is not None,
        HAS_TABLE=components is not None,
        GROUPED=group_offsets is not None,
        PRECISION=dot_precision(u.dtype),
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )
    return out


@expand.register_fake
def _(u, b, ranks, scaling, gate=None, components=None, group_offsets=None, base=None):
    return (u if base is None else base).new_empty(u.shape[0], b.shape[1])
