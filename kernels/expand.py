"""expand: ``out[i] = base[i] + scaling * sum_j gate_j u[i, j] b[comp(e_i, j)]``; base may be out itself.

Memory-bound: one read and one write of the output tile; the loop runs over live rank tiles alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._tiles import check_in_place, dot_precision, locate_tile, pool_rows, row_tiles


@triton.jit(do_not_specialize=["num_rows"])
def expand_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    b_ptr,  # [R, N]
    gate_ptr,  # [R]
    base_ptr,  # [L, N], may be out_ptr
    out_ptr,  # [L, N], output
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
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

    offs = offs_m.to(tl.int64)[:, None] * num_cols + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BASE:  # first, to be on its way during the product
        base = tl.load(base_ptr + offs, mask=mask, other=0.0)

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

    out = acc * scaling
    if HAS_BASE:
        out += base.to(tl.float32)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    out: Tensor,
    base: Tensor | None,
    u: Tensor,
    b: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None,
    components: Tensor | None,
    group_offsets: Tensor | None,
) -> None:
    num_rows, num_cols, num_experts = out.shape[0], out.shape[1], ranks.shape[0]
    tile = tile_for("expand", u.shape[1], u.dtype)
    grid = (row_tiles(num_rows, num_experts, tile.block_m), triton.cdiv(num_cols, tile.block_n))
    if out.numel() == 0:
        return
    expand_kernel[grid](
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


@torch.library.custom_op("lrlora_triton::expand_", mutates_args={"out"})
def expand_(
    out: Tensor,
    u: Tensor,
    b: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
) -> None:
    """Accumulates the expansion of u ``[L, WIDTH]`` by b ``[R, N]`` into the contiguous out ``[L, N]``."""
    check_in_place(out)
    _launch(out, out, u, b, ranks, scaling, gate, components, group_offsets)


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
    """``base`` (or zero) plus the expansion, as a new tensor ``[L, N]`` in base's dtype (or u's).

    Rows of no expert are zero.
    """
    base = None if base is None else base.contiguous()
    like = u if base is None else base
    # Rows of no expert are in no tile.
    out = (like.new_empty if group_offsets is None else like.new_zeros)(u.shape[0], b.shape[1])
    _launch(out, base, u, b, ranks, scaling, gate, components, group_offsets)
    return out


@expand.register_fake
def _(u, b, ranks, scaling, gate=None, components=None, group_offsets=None, base=None):
    return (u if base is None else base).new_empty(u.shape[0], b.shape[1])
