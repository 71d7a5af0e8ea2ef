"""adapter_gradients: all sums over rows of a projection of experts, in one launch.

    d_a = gram(w v, x)    d_b = gram(w u, dy)    c[comp(e, j)] = scaling * sum_{i in e} w_i u[i, j] v[i, j]

w are routing weights, or ones. Each program owns its part of one result, with all rows of an expert, or a share of
those of a long expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels import _configs
from lrlora_ops.kernels._shares import locate_share, sum_shares
from lrlora_ops.kernels._tiles import dot_precision, pool_rows, row_major
from lrlora_ops.kernels.gram import gram_tile, row_weights, store_gram

# Below, a share is too little work to pay for its partial sums.
_LEAST_ROWS = 1024


@triton.jit
def sum_statistics(
    u_ptr,  # [L, WIDTH]
    v_ptr,  # [L, WIDTH]
    weights_ptr,  # [T, k]
    d_weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    first,
    end,
    offs_r,
    WIDTH: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DEMAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``sum over rows first <= i < end`` of ``w_i u[i, offs_r] v[i, offs_r]``, and in slots 0 and 1 the number of those
    whose weight has a gradient and the sum of their w_i, fp32 [BLOCK_R, 2]."""
    c = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for m in range(first, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        slots = offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
        u = tl.load(u_ptr + slots, mask=mask_m[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + slots, mask=mask_m[:, None], other=0.0).to(tl.float32)
        weights = row_weights(weights_ptr, row_order_ptr, offs_m, mask_m, HAS_WEIGHTS)
        c += u * v * weights[:, None]
        if HAS_DEMAND:
            has_gradient = row_weights(d_weights_ptr, row_order_ptr, offs_m, mask_m, True) != 0.0
            count += has_gradient.to(tl.float32)
            total += tl.where(has_gradient, weights, 0.0)
    routed = tl.where(tl.arange(0, BLOCK_R) == 0, tl.sum(count, 0), tl.sum(total, 0))
    return tl.join(tl.sum(c, 0), routed)


@triton.jit(do_not_specialize=["num_rows", "share_rows"])
def adapter_gradients_kernel(
    u_ptr,  # [L, WIDTH], zero beyond the rank
    v_ptr,  # [L, WIDTH], zero beyond the rank
    x_ptr,  # [M, K]
    dy_ptr,  # [M', N]
    d_a_ptr,  # [R, K], output
    d_b_ptr,  # [R, N], output
    c_ptr,  # [R] fp32, output
    demand_ptr,  # [2, E] fp32, output
    partial_ptr,  # [slots, rank tiles, column tiles, BLOCK_N, BLOCK_R] fp32, of experts of several shares
    counters_ptr,  # [slots, rank tiles, column tiles] int32, zeros; that of an expert's first slot counts its shares
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    x_index_ptr,  # [L]
    dy_index_ptr,  # [L]
    weights_ptr,  # [T, k]
    d_weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    num_rows,
    in_features,
    out_features,
    num_experts,
    max_rank,
    share_rows,
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
    IS_HIP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of one expert's rows for BLOCK_R rank slots by BLOCK_N columns of d_a or of d_b; or for its statistics.

    Grid: (shares * rank tiles * column tiles,), the last fastest: those of d_a, those of d_b, and the statistics'.
    """
    tiles_a, rank_tiles = tl.cdiv(in_features, BLOCK_N), WIDTH // BLOCK_R
    tiles = tiles_a + tl.cdiv(out_features, BLOCK_N) + 1
    tile, rank_tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles % rank_tiles
    shares_before = tl.program_id(0) // (tiles * rank_tiles)
    expert, share, num_shares, slot, first, end = locate_share(
        shares_before, group_offsets_ptr, num_rows, num_experts, share_rows, True, BLOCK_M, BLOCK_E
    )
    if expert >= num_experts:
        return
    is_statistics = tile == tiles - 1
    rank = tl.load(ranks_ptr + expert)
    if rank_tile * BLOCK_R >= rank and not (HAS_DEMAND and is_statistics and rank_tile == 0):
        return
    offs_r = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    pool = pool_rows(components_ptr, expert, offs_r, rank, max_rank, True)

    SIZE: tl.constexpr = BLOCK_N * BLOCK_R
    results = rank_tiles * tiles
    result = slot.to(tl.int64) * results + rank_tile * tiles + tile
    if tile < tiles_a:
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = gram_tile(
            v_ptr, x_ptr, x_index_ptr, weights_ptr, row_order_ptr, first, end, offs_r, offs_n, in_features, stride_xm,
            WIDTH, HAS_X_INDEX, HAS_WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc, has_sum = sum_shares(acc, partial_ptr, counters_ptr, result, results, share, num_shares, SIZE, IS_HIP)
        live = tl.where(has_sum, rank, 0)
        store_gram(d_a_ptr, acc, gate_ptr, pool, offs_r, live, offs_n, in_features, scaling, HAS_GATE)
    elif not is_statistics:
        offs_n = (tile - tiles_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = gram_tile(
            u_ptr, dy_ptr, dy_index_ptr, weights_ptr, row_order_ptr, first, end, offs_r, offs_n, out_features,
            stride_dym, WIDTH, HAS_DY_INDEX, HAS_WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc, has_sum = sum_shares(acc, partial_ptr, counters_ptr, result, results, share, num_shares, SIZE, IS_HIP)
        live = tl.where(has_sum, rank, 0)
        store_gram(d_b_ptr, acc, gate_ptr, pool, offs_r, live, offs_n, out_features, scaling, HAS_GATE)
    else:
        both = sum_statistics(
            u_ptr, v_ptr, weights_ptr, d_weights_ptr, row_order_ptr, first, end, offs_r, WIDTH, HAS_WEIGHTS, HAS_DEMAND,
            BLOCK_M, BLOCK_R,
        )  # fmt: skip
        both, has_sum = sum_shares(both, partial_ptr, counters_ptr, result, results, share, num_shares, SIZE, IS_HIP)
        c, routed = tl.split(both)
        tl.store(c_ptr + pool, scaling * c, mask=(offs_r < rank) & has_sum)
        if HAS_DEMAND:
            tl.store(demand_ptr + offs_r * num_experts + expert, routed, mask=(offs_r < 2) & has_sum)


@torch.library.custom_op("lrlora_triton::adapter_gradients", mutates_args=("d_a", "d_b", "c", "demand", "counters"))
def adapter_gradients(
    d_a: Tensor,
    d_b: Tensor,
    c: Tensor,
    demand: Tensor | None,
    counters: Tensor,
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
    d_weights: Tensor | None = None,
) -> None:
    """Writes the rows of live components of d_a ``[R, K]``, d_b ``[R, N]`` and c fp32 ``[R]``; all other rows stay.

    u and v are ``[L, WIDTH]``. ``x_index`` ``[L]`` gathers rows of x, ``dy_index`` rows of dy. ``weights`` ``[T, k]``
    come with ``row_order`` ``[L]``, which names each row's. demand, fp32 ``[2, E]``, gets the number of each expert's
    rows whose ``d_weights`` ``[T, k]`` is not zero, and the sums of their weights. ``counters`` ``[C]``, int32 zeros,
    are used up: at most C programs have a share of an expert's rows, and none has more than ``4 / C`` of all work, or
    two times ``_LEAST_ROWS``.
    """
    x, dy, u, v = row_major(x), row_major(dy), u.contiguous(), v.contiguous()
    (num_experts, max_rank), width = components.shape, u.shape[1]
    rows_per_expert, features = u.shape[0] // num_experts, (x.shape[1], dy.shape[1])
    tile = _configs.tile_for("adapter_gradients", width, x.dtype, rows_per_expert, *features)
    column_tiles = triton.cdiv(x.shape[1], tile.block_n) + triton.cdiv(dy.shape[1], tile.block_n) + 1
    results, num_rows = column_tiles * (width // tile.block_r), u.shape[0]
    share_rows = max(_LEAST_ROWS, triton.cdiv(num_rows, max(counters.numel() // results, 1)))
    slots = num_rows // share_rows
    partial = u.new_empty((slots if slots > 1 else 0) * results * tile.block_n * tile.block_r, dtype=torch.float32)
    adapter_gradients_kernel[((slots + num_experts) * results,)](
        u,
        v,
        x,
        dy,
        d_a,
        d_b,
        c,
        demand,
        partial,
        counters,
        gate,
        ranks,
        components,
        group_offsets,
        x_index,
        dy_index,
        None if weights is None else weights.contiguous(),
        None if d_weights is None else d_weights.contiguous(),
        row_order,
        num_rows,
        x.shape[1],
        dy.shape[1],
        num_experts,
        max_rank,
        share_rows,
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
        IS_HIP=_configs.backend() == "hip",
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )


@adapter_gradients.register_fake
def _(
    d_a, d_b, c, demand, counters, u, v, x, dy, ranks, scaling, gate, components, group_offsets,
    x_index=None, dy_index=None, weights=None, row_order=None, d_weights=None,
):  # fmt: skip
    return None
