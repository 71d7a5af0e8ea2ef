"""adapter_gradients: all sums over rows of a projection of experts, in one launch.

    d_a = gram(w v, x)    d_b = gram(w u, dy)    c[comp(e, j)] = scaling * sum_{i in e} w_i u[i, j] v[i, j]

w are routing weights, or ones. Each program owns its part of one result, with all rows of an expert: no partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._tiles import dot_precision, pool_rows, row_major
from lrlora_ops.kernels.gram import gram_tile, row_weights, store_gram


@triton.jit
def sum_statistics(
    u_ptr,  # [L, WIDTH]
    v_ptr,  # [L, WIDTH]
    c_ptr,  # [R] fp32, output
    demand_ptr,  # [2, E] fp32, output
    weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    expert,
    first,
    end,
    rank,
    offs_r,
    pool,
    num_experts,
    scaling,
    WIDTH: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DEMAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """c of BLOCK_R components of one expert, and how many rows of which weights it has."""
    c = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for m in range(first, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        slots = offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
        u = tl.load(u_ptr + slots, mask=mask_m[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + slots, mask=mask_m[:, None], other=0.0).to(tl.float32)
        weights = row_weights(weights_ptr, row_order_ptr, offs_m, mask_m, HAS_WEIGHTS)
        c += u * v * weights[:, None]
        total += weights
    tl.store(c_ptr + pool, scaling * tl.sum(c, 0), mask=offs_r < rank)
    if HAS_DEMAND:
        is_first = tl.min(offs_r, 0) == 0
        tl.store(demand_ptr + expert, (end - first).to(tl.float32), mask=is_first)
        tl.store(demand_ptr + num_experts + expert, tl.sum(total, 0), mask=is_first)


@triton.jit
def adapter_gradients_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    v_ptr,  # [L, WIDTH], zero beyond the rank
    x_ptr,  # [M, K]
    dy_ptr,  # [M', N]
    d_a_ptr,  # [R, K], output
    d_b_ptr,  # [R, N], output
    c_ptr,  # [R] fp32, output
    demand_ptr,  # [2, E] fp32, output
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    x_index_ptr,  # [L]
    dy_index_ptr,  # [L]
    weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    in_features,
    out_features,
    num_experts,
    max_rank,
    stride_xm,
    stride_dym,
    scaling,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_X_INDEX: tl.constexpr,
    HAS_DY_INDEX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DEMAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rank slots of one expert by BLOCK_N columns of d_a or of d_b; or its statistics.

    Grid: (column tiles of d_a, then of d_b, then one; E * rank tiles).
    """
    tile, tiles_a = tl.program_id(0), tl.cdiv(in_features, BLOCK_N)
    tiles = tiles_a + tl.cdiv(out_features, BLOCK_N)
    expert = tl.program_id(1) // (WIDTH // BLOCK_R)
    first_slot = tl.program_id(1) % (WIDTH // BLOCK_R) * BLOCK_R
    rank = tl.load(ranks_ptr + expert)
    if first_slot >= rank and not (HAS_DEMAND and tile == tiles and first_slot == 0):
        return
    first = tl.load(group_offsets_ptr + expert)
    end = tl.load(group_offsets_ptr + expert + 1)
    offs_r = first_slot + tl.arange(0, BLOCK_R)
    pool = pool_rows(components_ptr, expert, offs_r, rank, max_rank, True)
    if tile < tiles_a:
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = gram_tile(
            v_ptr, x_ptr, x_index_ptr, weights_ptr, row_order_ptr, first, end, offs_r, offs_n, in_features, stride_xm,
            WIDTH, HAS_X_INDEX, HAS_WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        store_gram(d_a_ptr, acc, gate_ptr, pool, offs_r, rank, offs_n, in_features, scaling, HAS_GATE)
    elif tile < tiles:
        offs_n = (tile - tiles_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = gram_tile(
            u_ptr, dy_ptr, dy_index_ptr, weights_ptr, row_order_ptr, first, end, offs_r, offs_n, out_features,
            stride_dym, WIDTH, HAS_DY_INDEX, HAS_WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        store_gram(d_b_ptr, acc, gate_ptr, pool, offs_r, rank, offs_n, out_features, scaling, HAS_GATE)
    else:
        sum_statistics(
            u_ptr, v_ptr, c_ptr, demand_ptr, weights_ptr, row_order_ptr, expert, first, end, rank, offs_r, pool,
            num_experts, scaling, WIDTH, HAS_WEIGHTS, HAS_DEMAND, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@torch.library.custom_op("lrlora_triton::adapter_gradients", mutates_args=("d_a", "d_b", "c", "demand"))
def adapter_gradients(
    d_a: Tensor,
    d_b: Tensor,
    c: Tensor,
    demand: Tensor | None,
    u: Tensor,
    v: Tensor,
    x: Tensor,
    dy: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None,
    components: Tensor,
    group_offsets: Tensor,
    x_index: Tensor | None = None,
    dy_index: Tensor | None = None,
    weights: Tensor | None = None,
    row_order: Tensor | None = None,
) -> None:
    """Writes the rows of live components of d_a ``[R, K]``, d_b ``[R, N]`` and c fp32 ``[R]``; all other rows stay.

    u and v are ``[L, WIDTH]``. ``x_index`` ``[L]`` gathers rows of x, ``dy_index`` rows of dy. ``weights`` ``[T, k]``
    come with ``row_order`` ``[L]``, which names each row's. demand, fp32 ``[2, E]``, gets the experts' rows and the
    sums of their weights.
    """
    x, dy, u, v = row_major(x), row_major(dy), u.contiguous(), v.contiguous()
    (num_experts, max_rank), width = components.shape, u.shape[1]
    tile = tile_for("adapter_gradients", width, x.dtype)
    column_tiles = triton.cdiv(x.shape[1], tile.block_n) + triton.cdiv(dy.shape[1], tile.block_n) + 1
    adapter_gradients_kernel[column_tiles, num_experts * (width // tile.block_r)](
        u,
        v,
        x,
        dy,
        d_a,
        d_b,
        c,
        demand,
        gate,
        ranks,
        components,
        group_offsets,
        x_index,
        dy_index,
        None if weights is None else weights.contiguous(),
        row_order,
        x.shape[1],
        dy.shape[1],
        num_experts,
        max_rank,
        x.stride(0),
        dy.stride(0),
        scaling,
        WIDTH=width,
        HAS_GATE=gate is not None,
        HAS_X_INDEX=x_index is not None,
        HAS_DY_INDEX=dy_index is not None,
        HAS_WEIGHTS=weights is not None,
        HAS_DEMAND=demand is not None,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )


@adapter_gradients.register_fake
def _(
    d_a, d_b, c, demand, u, v, x, dy, ranks, scaling, gate, components, group_offsets,
    x_index=None, dy_index=None, weights=None, row_order=None,
):  # fmt: skip
    return None
