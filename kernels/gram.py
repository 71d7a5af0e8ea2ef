"""gram: ``d[comp(e, j)] = scaling * gate_j * sum_{i in e} u[i, j] y[i]``, the weight gradients.

The rank sits on the N axis of the MMA: [N x rows] @ [rows x r] is wgmma, [r x rows] @ [rows x N] is not. Few
experts with many rows are split over programs, each writing fp32 partial sums that ``reduce`` adds up in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._reduce import reduce_slabs
from lrlora_ops.kernels._tiles import dot_precision, pool_rows, row_major, source_rows

# Two programs for each multiprocessor of a large GPU: more would write more partial sums and hide no more latency.
_TARGET_PROGRAMS = 256


@triton.jit
def row_weights(
    weights_ptr,  # [T, k], unused unless HAS_WEIGHTS
    row_order_ptr,  # [L]
    offs_m,
    mask_m,
    HAS_WEIGHTS: tl.constexpr,
):
    """fp32 routing weights of the sorted rows ``offs_m``; ones without weights, zero where masked."""
    weights = mask_m.to(tl.float32)
    if HAS_WEIGHTS:
        pairs = tl.load(row_order_ptr + offs_m, mask=mask_m, other=0)
        weights = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
    return weights


@triton.jit
def gram_tile(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    y_ptr,  # [M, N]
    row_index_ptr,  # [L]
    weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    first,
    end,
    offs_r,
    offs_n,
    num_cols,
    stride_ym,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``sum over rows first <= i < end of w_i u[i, offs_r] y[i, offs_n]``, fp32 [BLOCK_N, BLOCK_R]."""
    mask_n = offs_n < num_cols
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for m in range(first, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        rows = source_rows(row_index_ptr, offs_m, mask_m, HAS_INDEX) * stride_ym
        y = tl.load(y_ptr + rows[:, None] + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        u = tl.load(u_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :], mask=mask_m[:, None], other=0.0)
        if HAS_WEIGHTS:
            u = u.to(tl.float32) * row_weights(weights_ptr, row_order_ptr, offs_m, mask_m, HAS_WEIGHTS)[:, None]
        acc = tl.dot(tl.trans(y), u.to(y.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_gram(
    d_ptr,  # [R, N], output
    acc,
    gate_ptr,  # [R]
    pool,
    offs_r,
    rank,
    offs_n,
    num_cols,
    scaling,
    HAS_GATE: tl.constexpr,
):
    """``scaling * gate * acc``, [BLOCK_N, BLOCK_R], into the pool rows of live components."""
    mask_r = offs_r < rank
    acc *= scaling
    if HAS_GATE:
        acc *= tl.load(gate_ptr + pool, mask=mask_r, other=0.0)[None, :]
    d = d_ptr + pool[None, :] * num_cols + offs_n[:, None]
    tl.store(d, acc.to(d_ptr.dtype.element_ty), mask=mask_r[None, :] & (offs_n < num_cols)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def gram_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    y_ptr,  # [M, N]
    d_ptr,  # [R, N] if SPLITS == 1, else fp32 [E * SPLITS, WIDTH, N]; output
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    row_index_ptr,  # [L]
    num_rows,
    num_cols,
    max_rank,
    stride_ym,
    scaling,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rank slots of one expert by BLOCK_N columns, over one of SPLITS shares of the expert's rows.

    Grid: (column tiles, E * rank tiles, SPLITS).
    """
    expert = tl.program_id(1) // (WIDTH // BLOCK_R)
    first_slot = tl.program_id(1) % (WIDTH // BLOCK_R) * BLOCK_R
    split = tl.program_id(2)
    rank = tl.load(ranks_ptr + expert)
    if first_slot >= rank:
        return
    first, end = 0, num_rows
    if GROUPED:
        first = tl.load(group_offsets_ptr + expert)
        end = tl.load(group_offsets_ptr + expert + 1)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_M) * BLOCK_M
        first += split * share
        end = tl.minimum(end, first + share)
    offs_r = first_slot + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = gram_tile(
        u_ptr, y_ptr, row_index_ptr, None, None, first, end, offs_r, offs_n, num_cols, stride_ym,
        WIDTH, HAS_INDEX, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if SPLITS > 1:
        rows = (expert * SPLITS + split).to(tl.int64) * WIDTH + offs_r
        store_gram(d_ptr, acc, gate_ptr, rows, offs_r, rank, offs_n, num_cols, 1.0, False)
    else:
        rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, HAS_TABLE)
        store_gram(d_ptr, acc, gate_ptr, rows, offs_r, rank, offs_n, num_cols, scaling, HAS_GATE)


def row_splits(num_rows: int, num_experts: int, programs: int, block_m: int) -> int:
    """Shares that an expert's rows are cut into: enough to fill the machine, each of four row blocks or more."""
    return max(1, min(_TARGET_PROGRAMS // max(programs, 1), num_rows // (num_experts * 4 * block_m)))


@torch.library.custom_op("lrlora_triton::gram", mutates_args=())
def gram(
    u: Tensor,
    y: Tensor,
    ranks: Tensor,
    pool_size: int,
    scaling: float,
    dtype: torch.dtype,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """d ``[pool_size, N]`` in ``dtype`` for u ``[L, WIDTH]`` and y ``[M, N]``; rows of dead components are zero.

    ``row_index`` ``[L]`` gathers rows of y; without it L is M.
    """
    u, y = u.contiguous(), row_major(y)
    num_rows, num_cols, num_experts, width = u.shape[0], y.shape[1], ranks.shape[0], u.shape[1]
    tile = tile_for("gram", width, y.dtype, num_rows // num_experts, num_cols)
    d = torch.zeros(pool_size, num_cols, dtype=dtype, device=y.device)
    columns, pairs = triton.cdiv(num_cols, tile.block_n), num_experts * (width // tile.block_r)
    splits = row_splits(num_rows, num_experts, columns * pairs, tile.block_m)
    if num_rows == 0 or d.numel() == 0:
        return d
    out = d if splits == 1 else u.new_empty(num_experts * splits, width, num_cols, dtype=torch.float32)
    gram_kernel[(columns, pairs, splits)](
        u,
        y,
        out,
        gate,
        ranks,
        components,
        group_offsets,
        row_index,
        num_rows,
        num_cols,
        0 if components is None else components.shape[1],
        y.stride(0),
        scaling,
        WIDTH=width,
        SPLITS=splits,
        HAS_GATE=gate is not None,
        HAS_TABLE=components is not None,
        GROUPED=group_offsets is not None,
        HAS_INDEX=row_index is not None,
        PRECISION=dot_precision(y.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )
    if splits > 1:
        reduce_slabs(out, d, ranks, scaling, gate, components, group_offsets, splits=splits)
    return d


@gram.register_fake
def _(u, y, ranks, pool_size, scaling, dtype, gate=None, components=None, group_offsets=None, row_index=None):
    return y.new_empty(pool_size, y.shape[1], dtype=dtype)
