"""reduce: ``d[comp(e, j)] = factor_j * sum over the expert's slabs s of partial[s, j]``, in a fixed order.

The deterministic second half of sums whose programs have all columns of some rows: each wrote its own slab.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._tiles import expert_tiles, pool_rows

_BLOCK_N = 128
_BLOCK_S = 32


@triton.jit
def slabs_of(
    expert,
    group_offsets_ptr,  # [E + 1]
    num_experts,
    num_slabs,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """First and end slab of an expert, which has one for each of its row tiles; a dense layer has all."""
    first, end = expert * 0, num_slabs
    if GROUPED:
        tiles = expert_tiles(group_offsets_ptr, num_experts, BLOCK_M, BLOCK_E)
        offs_e = tl.arange(0, BLOCK_E)
        first = tl.sum(tl.where(offs_e < expert, tiles, 0), 0)
        end = first + tl.sum(tl.where(offs_e == expert, tiles, 0), 0)
    return first, end


@triton.jit(do_not_specialize=["num_slabs"])
def reduce_kernel(
    partial_ptr,  # [slabs, WIDTH, N] fp32
    d_ptr,  # [R, N], output
    gate_ptr,  # [R]
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    num_slabs,
    num_cols,
    num_experts,
    max_rank,
    scaling,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One rank slot of one expert by BLOCK_N columns, BLOCK_S slabs at a time. Grid: (E * WIDTH, column tiles)."""
    expert = tl.program_id(0) // WIDTH
    slot = tl.program_id(0) % WIDTH
    rank = tl.load(ranks_ptr + expert)
    if slot >= rank:
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_cols
    first, end = slabs_of(expert, group_offsets_ptr, num_experts, num_slabs, GROUPED, BLOCK_M, BLOCK_E)

    acc = tl.zeros((BLOCK_S, BLOCK_N), dtype=tl.float32)
    for s in range(first, end, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        partial = (offs_s.to(tl.int64) * WIDTH + slot)[:, None] * num_cols + offs_n[None, :]
        acc += tl.load(partial_ptr + partial, mask=(offs_s < end)[:, None] & mask_n[None, :], other=0.0)

    row = pool_rows(components_ptr, expert, slot, rank, max_rank, HAS_TABLE)
    out = tl.sum(acc, 0) * scaling
    if HAS_GATE:
        out *= tl.load(gate_ptr + row)
    tl.store(d_ptr + row * num_cols + offs_n, out.to(d_ptr.dtype.element_ty), mask=mask_n)


def reduce_slabs(
    partial: Tensor,
    d: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None,
    components: Tensor | None,
    group_offsets: Tensor | None,
    *,
    block_m: int = 1,
) -> None:
    """Sums ``partial`` ``[slabs, WIDTH, N]`` into the live rows of d ``[R, N]``; see ``slabs_of`` for which."""
    num_slabs, width, num_cols = partial.shape
    num_experts = ranks.shape[0]
    if d.numel() == 0:
        return
    block_n = min(triton.next_power_of_2(num_cols), _BLOCK_N)
    reduce_kernel[(num_experts * width, triton.cdiv(num_cols, block_n))](
        partial,
        d,
        gate,
        ranks,
        components,
        group_offsets,
        num_slabs,
        num_cols,
        num_experts,
        0 if components is None else components.shape[1],
        scaling,
        WIDTH=width,
        HAS_GATE=gate is not None,
        HAS_TABLE=components is not None,
        GROUPED=group_offsets is not None,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK_S=_BLOCK_S if block_n > 1 else 128,
        BLOCK_N=block_n,
        enable_fp_fusion=True,
    )
