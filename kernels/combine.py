"""combine: ``out[t] = sum_k weights[t, k] rows[positions[t, k]]``, the experts' outputs back in token order.

Memory-bound: each row is read once, in 16-byte pieces. A token gathers its rows, in the order of k: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._tiles import row_major

_BLOCK_N = 1024


@triton.jit
def combine_kernel(
    rows_ptr,  # [L, N]
    positions_ptr,  # [T, TOP_K]
    weights_ptr,  # [T, TOP_K]
    end_ptr,  # [1]
    out_ptr,  # [T, N], output
    num_cols,
    stride_rm,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_END: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of one token. Grid: (T, column tiles)."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_cols

    is_row = True
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(positions_ptr + token * TOP_K + k).to(tl.int64)
        if HAS_END:
            is_row = row < tl.load(end_ptr)
        value = tl.load(rows_ptr + row * stride_rm + offs_n, mask=mask_n & is_row, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + token * TOP_K + k, mask=is_row, other=0.0).to(tl.float32)
        acc += value

    tl.store(out_ptr + token * num_cols + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_n)


@torch.library.custom_op("lrlora_triton::combine", mutates_args=())
def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None = None, group_offsets: Tensor | None = None
) -> Tensor:
    """out ``[T, N]`` in rows' dtype, for rows ``[L, N]``, positions ``[T, k]`` and weights ``[T, k]`` (None: ones).

    With ``group_offsets`` ``[E + 1]``, rows past the last offset add nothing, whatever their weights.
    """
    rows = row_major(rows)
    num_tokens, top_k = positions.shape
    num_cols = rows.shape[1]
    out = rows.new_empty(num_tokens, num_cols)
    if out.numel() == 0:
        return out
    block_n = min(triton.next_power_of_2(num_cols), _BLOCK_N)
    combine_kernel[(num_tokens, triton.cdiv(num_cols, block_n))](
        rows,
        positions.contiguous(),
        None if weights is None else weights.contiguous(),
        None if group_offsets is None else group_offsets[-1:],
        out,
        num_cols,
        rows.stride(0),
        TOP_K=top_k,
        HAS_WEIGHTS=weights is not None,
        HAS_END=group_offsets is not None,
        BLOCK_N=block_n,
        enable_fp_fusion=True,
    )
    return out


@combine.register_fake
def _(rows, positions, weights=None, group_offsets=None):
    return rows.new_empty(positions.shape[0], rows.shape[1])
