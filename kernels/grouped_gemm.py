"""grouped_gemm: ``y[i] = W[e_i] x[row_index[i]] + bias[e_i] + scaling * sum_j gate_j u[i, j] b[comp(e_i, j)]``.

The frozen base product of experts, whose accumulator starts from the low-rank product: y is written once, and read
never. Compute-bound from about a hundred rows per expert on. Column tiles of a few row tiles run side by side, so that
x and the expert's weight come from the L2. Rows are gathered by pointer, and no copy of x is permuted. A variant that
changes what is stored is an epilogue of the same kernel (``launch_gemm``).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import gemm_tile
from lrlora_ops.kernels._tiles import dot_precision, locate_tile, row_major, row_tiles, source_rows, stores_end
from lrlora_ops.kernels.expand import low_rank_product

# Row tiles whose programs run side by side.
_GROUP_M = 8
# The step along the rank: with 32, a program takes more registers than two on a multiprocessor may.
_BLOCK_R = 16


@triton.jit(do_not_specialize=["num_rows"])
def grouped_gemm_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [E, K, N] with any strides
    bias_ptr,  # [E, N]
    y_ptr,  # [L, N], output
    group_offsets_ptr,  # [E + 1]
    row_index_ptr,  # [L]
    u_ptr,  # [L, WIDTH], zero beyond the rank
    b_ptr,  # [R, N]
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    num_rows,
    in_features,
    out_features,
    num_experts,
    max_rank,
    scaling,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    operand_ptr=None,  # what EPILOGUE reads
    EPILOGUE: tl.constexpr = None,
):
    """One tile of BLOCK_M rows of one expert by BLOCK_N columns. Grid: (row tiles * column tiles,).

    The last expert's tiles go on to the last row, with zeros where its rows have ended.
    """
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    pid_m, pid_n = tl.swizzle2d(
        pid // column_tiles, pid % column_tiles, programs // column_tiles, column_tiles, GROUP_M
    )
    expert, first, end = locate_tile(pid_m, group_offsets_ptr, num_rows, num_experts, GROUPED, BLOCK_M, BLOCK_E)
    end_of_stores = stores_end(expert, end, num_rows, num_experts)
    if first >= end_of_stores:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < out_features
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HAS_LOW_RANK:
        acc = scaling * low_rank_product(
            u_ptr,
            b_ptr,
            gate_ptr,
            components_ptr,
            expert,
            tl.where(first < end, tl.load(ranks_ptr + expert), 0),
            offs_m,
            mask_m,
            offs_n,
            mask_n,
            out_features,
            max_rank,
            WIDTH,
            HAS_GATE,
            HAS_TABLE,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )

    x_rows = source_rows(row_index_ptr, offs_m, mask_m, HAS_INDEX) * stride_xm
    weight_cols = expert.to(tl.int64) * stride_we + offs_n.to(tl.int64) * stride_wn
    live_features = tl.where(first < end, in_features, 0)
    for k in range(0, live_features, BLOCK_K):
        mask_k = k + offs_k < in_features
        x = tl.load(x_ptr + x_rows[:, None] + (k + offs_k)[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight_rows = (k + offs_k).to(tl.int64) * stride_wk
        weight = tl.load(
            weight_ptr + weight_rows[:, None] + weight_cols[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        acc = tl.dot(x, weight.to(x.dtype), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * out_features + offs_n, mask=mask_n, other=0.0)
        acc += tl.where(mask_m[:, None], bias[None, :], 0.0)
    if EPILOGUE is not None:
        acc = tl.where(mask_m[:, None], EPILOGUE(acc, operand_ptr, offs_m, mask_m, offs_n, mask_n), 0.0)

    offs = offs_m.to(tl.int64)[:, None] * out_features + offs_n[None, :]
    mask = (offs_m < end_of_stores)[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
    u: Tensor | None = None,
    b: Tensor | None = None,
    ranks: Tensor | None = None,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    epilogue: Any = None,
    operand: Tensor | None = None,
) -> Tensor:
    """``grouped_gemm``, or a variant of it: what ``epilogue`` makes of each fp32 tile is rounded and stored.

    The epilogue is a ``triton.jit`` function ``(acc, operand_ptr, offs_m, mask_m, offs_n, mask_n) -> acc``. It gets a
    tile ``[BLOCK_M, BLOCK_N]`` of y, a pointer to ``operand``, and which rows and columns of y these are. Rows that
    belong to no expert are zero whatever it returns for them.
    """
    x = row_major(x)
    weight = weight if transposed else weight.transpose(1, 2)
    num_experts, in_features, out_features = weight.shape
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    y = x.new_empty(num_rows, out_features)
    if y.numel() == 0:
        return y
    tile = gemm_tile(num_rows // num_experts, x.dtype, in_features, out_features)
    width = 16 if u is None else u.shape[1]
    programs = row_tiles(num_rows, num_experts, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    grouped_gemm_kernel[(programs,)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        y,
        group_offsets,
        row_index,
        None if u is None else u.contiguous(),
        None if b is None else b.contiguous(),
        gate,
        ranks,
        components,
        num_rows,
        in_features,
        out_features,
        num_experts,
        0 if components is None else components.shape[1],
        scaling,
        x.stride(0),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        GROUPED=group_offsets is not None,
        HAS_INDEX=row_index is not None,
        HAS_LOW_RANK=u is not None,
        HAS_GATE=gate is not None,
        HAS_TABLE=components is not None,
        WIDTH=width,
        PRECISION=dot_precision(x.dtype),
        GROUP_M=_GROUP_M,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_r,
        BLOCK_R=_BLOCK_R,
        operand_ptr=operand,
        EPILOGUE=epilogue,
        **tile.launch_options(),
    )
    return y


@torch.library.custom_op("lrlora_triton::grouped_gemm", mutates_args=())
def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
    u: Tensor | None = None,
    b: Tensor | None = None,
    ranks: Tensor | None = None,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    components: Tensor | None = None,
) -> Tensor:
    """y ``[L, N]`` in x's dtype, for x ``[M, K]``, bias ``[E, N]`` and weight ``[E, N, K]`` (``[E, K, N]`` transposed).

    ``group_offsets`` int32 ``[E + 1]`` says which rows are whose; without it E is 1. ``row_index`` ``[L]`` gathers
    rows of x; without it L is M. With u ``[L, WIDTH]`` come b ``[R, N]`` and ranks ``[E]``, and the expansion of u is
    added as ``expand`` computes it. Rows that belong to no expert are zero.
    """
    return launch_gemm(x, weight, bias, transposed, group_offsets, row_index, u, b, ranks, scaling, gate, components)


@grouped_gemm.register_fake
def _(
    x, weight, bias=None, transposed=False, group_offsets=None, row_index=None,
    u=None, b=None, ranks=None, scaling=1.0, gate=None, components=None,
):  # fmt: skip
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    return x.new_empty(num_rows, weight.shape[2 if transposed else 1])
