"""gram: ``d[comp(e, j)] = scaling * gate_j * sum_{i in e} u[i, j] y[i]``, the weight gradients.

The rank sits on the N axis of the MMA: [N x rows] @ [rows x r] is wgmma, [r x rows] @ [rows x N] is not. The rows of
a dense layer, and of a long expert, are cut into shares for several programs (``_shares``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels import _configs
from lrlora_ops.kernels._shares import locate_share, sum_shares
from lrlora_ops.kernels._tiles import dot_precision, pool_rows, row_major, source_rows

# Two programs for each multiprocessor of a large GPU: more would write more partial sums and hide no more latency.
_PROGRAMS = 256
# Few experts are long, and what other programs have left of a long one is waited for: shorter shares.
_PROGRAMS_OF_EXPERTS = 1024
# Below, in row blocks, a share is too little work to pay for its partial sums.
_LEAST_BLOCKS = 4


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


@triton.jit(do_not_specialize=["num_rows", "share_rows"])
def gram_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    y_ptr,  # [M, N]
    d_ptr,  # [R, N], output
    partial_ptr,  # [slots, rank tiles, column tiles, BLOCK_N, BLOCK_R] fp32, of experts of several shares
    counters_ptr,  # [slots, rank tiles, column tiles] int32, zeros
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    row_index_ptr,  # [L]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    share_rows,
    stride_ym,
    scaling,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_HIP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of one expert's rows for BLOCK_R rank slots by BLOCK_N columns.

    Grid: (shares * rank tiles * column tiles,), the last fastest.
    """
    SIZE: tl.constexpr = BLOCK_N * BLOCK_R
    tiles = tl.cdiv(num_cols, BLOCK_N)
    results = tiles * (WIDTH // BLOCK_R)
    first_slot = tl.program_id(0) // tiles % (WIDTH // BLOCK_R) * BLOCK_R
    expert, share, num_shares, slot, first, end = locate_share(
        tl.program_id(0) // results, group_offsets_ptr, num_rows, num_experts, share_rows, GROUPED, BLOCK_M, BLOCK_E
    )
    if expert >= num_experts:
        return
    rank = tl.load(ranks_ptr + expert)
    if first_slot >= rank:
        return
    offs_r = first_slot + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = gram_tile(
        u_ptr, y_ptr, row_index_ptr, None, None, first, end, offs_r, offs_n, num_cols, stride_ym,
        WIDTH, HAS_INDEX, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    result = slot.to(tl.int64) * results + tl.program_id(0) % results
    acc, has_sum = sum_shares(acc, partial_ptr, counters_ptr, result, results, share, num_shares, SIZE, IS_HIP)
    rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, HAS_TABLE)
    live = tl.where(has_sum, rank, 0)
    store_gram(d_ptr, acc, gate_ptr, rows, offs_r, live, offs_n, num_cols, scaling, HAS_GATE)


def rows_of_a_share(num_rows: int, results: int, grouped: bool, block_m: int) -> int:
    """As few as give all programs a share where one expert has all rows, each of ``results`` results."""
    programs = _PROGRAMS_OF_EXPERTS if grouped else _PROGRAMS
    return min(max(_LEAST_BLOCKS * block_m, num_rows * results // programs), num_rows)


def launch_gram(
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
    """``gram`` itself, for launchers that take it as a part."""
    u, y = u.contiguous(), row_major(y)
    num_rows, num_cols, num_experts, width = u.shape[0], y.shape[1], ranks.shape[0], u.shape[1]
    tile = _configs.tile_for("gram", width, y.dtype, num_rows // num_experts, num_cols)
    d = torch.zeros(pool_size, num_cols, dtype=dtype, device=y.device)
    if num_rows == 0 or d.numel() == 0:
        return d
    results = triton.cdiv(num_cols, tile.block_n) * (width // tile.block_r)
    share_rows = rows_of_a_share(num_rows, results, group_offsets is not None, tile.block_m)
    slots = num_rows // share_rows
    shares = max(slots, 1) if group_offsets is None else slots + num_experts
    counters = u.new_zeros((slots if slots > 1 else 0) * results, dtype=torch.int32)
    gram_kernel[(shares * results,)](
        u,
        y,
        d,
        u.new_empty(counters.numel() * tile.block_n * tile.block_r, dtype=torch.float32),
        counters,
        gate,
        ranks,
        components,
        group_offsets,
        row_index,
        num_rows,
        num_cols,
        num_experts,
        0 if components is None else components.shape[1],
        share_rows,
        y.stride(0),
        scaling,
        WIDTH=width,
        HAS_GATE=gate is not None,
        HAS_TABLE=components is not None,
        GROUPED=group_offsets is not None,
        HAS_INDEX=row_index is not None,
        PRECISION=dot_precision(y.dtype),
        IS_HIP=_configs.backend() == "hip",
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )
    return d


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
    return launch_gram(u, y, ranks, pool_size, scaling, dtype, gate, components, group_offsets, row_index)


@gram.register_fake
def _(u, y, ranks, pool_size, scaling, dtype, gate=None, components=None, group_offsets=None, row_index=None):
    return y.new_empty(pool_size, y.shape[1], dtype=dtype)
