"""shrink_gram: one pass over dy for ``v = dy b^T``, ``d_b = scaling * gate * u^T dy`` and ``c = scaling * sum u v``.

A program owns a tile of rows, so it has all of v; it writes its share of d_b and c as fp32 partial sums, which
``reduce`` adds up in order. Those cost 8 WIDTH bytes per column and row tile, against the second read of dy that
they save; where they cost more, d_b is left to ``gram``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._reduce import reduce_slabs
from lrlora_ops.kernels._tiles import dot_precision, locate_tile, pool_rows, row_major, row_tiles, source_rows
from lrlora_ops.kernels.gram import launch_gram


@triton.jit(do_not_specialize=["num_rows"])
def shrink_gram_kernel(
    dy_ptr,  # [T, N]
    b_ptr,  # [R, N]
    u_ptr,  # [L, WIDTH], zero beyond the rank
    v_ptr,  # [L, WIDTH], output
    d_b_ptr,  # [row tiles, WIDTH, N] fp32, output if FUSE_GRAM
    c_ptr,  # [row tiles, WIDTH] fp32, output
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    row_index_ptr,  # [L]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    stride_dym,
    WIDTH: tl.constexpr,
    FUSE_GRAM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of BLOCK_M rows of one expert by BLOCK_R rank slots. Grid: (row tiles, rank tiles)."""
    pid_m = tl.program_id(0)
    expert, first, end = locate_tile(pid_m, group_offsets_ptr, num_rows, num_experts, GROUPED, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(ranks_ptr + expert)
    mask_r = offs_r < rank
    offs_n = tl.arange(0, BLOCK_N)

    dy_rows = source_rows(row_index_ptr, offs_m, mask_m, HAS_INDEX) * stride_dym
    b_rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, HAS_TABLE) * num_cols
    slots = offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
    partial_rows = (pid_m.to(tl.int64) * WIDTH + offs_r) * num_cols
    u = tl.load(u_ptr + slots, mask=mask_m[:, None], other=0.0)
    v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    live_cols = tl.where(tl.program_id(1) * BLOCK_R < rank, num_cols, 0)
    for n in range(0, live_cols, BLOCK_N):
        mask_n = n + offs_n < num_cols
        dy = tl.load(
            dy_ptr + dy_rows[:, None] + (n + offs_n)[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0
        )
        b = tl.load(b_ptr + b_rows[:, None] + (n + offs_n)[None, :], mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        v = tl.dot(dy, tl.trans(b.to(dy.dtype)), v, input_precision=PRECISION)
        if FUSE_GRAM:
            d_b = tl.dot(tl.trans(dy), u.to(dy.dtype), input_precision=PRECISION)
            offs = partial_rows[None, :] + (n + offs_n)[:, None]
            tl.store(d_b_ptr + offs, d_b, mask=mask_r[None, :] & mask_n[:, None])

    tl.store(v_ptr + slots, v.to(v_ptr.dtype.element_ty), mask=mask_m[:, None])
    tl.store(c_ptr + pid_m.to(tl.int64) * WIDTH + offs_r, tl.sum(u.to(tl.float32) * v, 0))


def fuses_gram(width: int, block_m: int, itemsize: int) -> bool:
    """Whether writing and reading the fp32 partials moves fewer bytes than reading dy again."""
    return 8 * width < itemsize * block_m


@torch.library.custom_op("lrlora_triton::shrink_gram", mutates_args=())
def shrink_gram(
    dy: Tensor,
    b: Tensor,
    u: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v ``[L, WIDTH]`` in dy's dtype, d_b ``[R, N]`` in b's dtype and c ``[R]`` in fp32, for dy ``[T, N]``.

    ``row_index`` ``[L]`` gathers rows of dy; without it L is T.
    """
    dy, u = row_major(dy), u.contiguous()
    num_rows, num_cols, num_experts, width = u.shape[0], dy.shape[1], ranks.shape[0], u.shape[1]
    tile = tile_for("shrink_gram", width, dy.dtype, num_rows // num_experts, num_cols)
    tiles = row_tiles(num_rows, num_experts, tile.block_m)
    fused = fuses_gram(width, tile.block_m, dy.element_size())
    v = (dy.new_empty if group_offsets is None else dy.new_zeros)(u.shape)
    c_partial = u.new_empty(tiles, width, 1, dtype=torch.float32)
    d_partial = u.new_empty(tiles if fused else 0, width, num_cols, dtype=torch.float32)
    c = torch.zeros(b.shape[0], dtype=torch.float32, device=dy.device)
    if num_rows:
        shrink_gram_kernel[(tiles, width // tile.block_r)](
            dy,
            b.contiguous(),
            u,
            v,
            d_partial,
            c_partial,
            ranks,
            components,
            group_offsets,
            row_index,
            num_rows,
            num_cols,
            num_experts,
            0 if components is None else components.shape[1],
            dy.stride(0),
            WIDTH=width,
            FUSE_GRAM=fused,
            HAS_TABLE=components is not None,
            GROUPED=group_offsets is not None,
            HAS_INDEX=row_index is not None,
            PRECISION=dot_precision(dy.dtype),
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_R=tile.block_r,
            **tile.launch_options(),
        )
    reduce_slabs(c_partial, c[:, None], ranks, scaling, None, components, group_offsets, block_m=tile.block_m)
    if not fused:
        d_b = launch_gram(u, dy, ranks, b.shape[0], scaling, b.dtype, gate, components, group_offsets, row_index)
        return v, d_b, c
    d_b = b.new_zeros(b.shape)
    reduce_slabs(d_partial, d_b, ranks, scaling, gate, components, group_offsets, block_m=tile.block_m)
    return v, d_b, c


@shrink_gram.register_fake
def _(dy, b, u, ranks, scaling, gate=None, components=None, group_offsets=None, row_index=None):
    return dy.new_empty(u.shape), b.new_empty(b.shape), dy.new_empty(b.shape[0], dtype=torch.float32)
