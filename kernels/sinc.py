"""sinc_weight and sinc_gradients: a frozen weight plus a learned elementwise function phi of a low-rank product.

    sinc_weight     W + scaling * phi(Z),  Z = b^T a,  phi(z) = z + sum_k c_k (psi_k(z) - psi_k(0))
    sinc_gradients  from m = dy^T x, with  dZ = m phi'(Z):
                    d_a = scaling * b dZ,  d_b = scaling * a dZ^T,  d_c[k] = scaling * sum m (psi_k(Z) - psi_k(0))

Z, phi and dZ exist a tile at a time, in registers: of nine coefficients at most by ``_phi_nine.py``, of more by
``_phi.py``, which takes instructions for each.

Experts are matrices of one tensor, each with its own rows of a and b, and one c for all. Those without rows are left
out: nothing reads what their part of a buffer holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._low_rank import load_factor, low_rank_tile
from lrlora_ops.kernels._phi import psi_gradients, psi_sum
from lrlora_ops.kernels._phi_nine import (
    NINE,
    nine_gradients,
    nine_sum,
    of_coefficients,
    power_coefficients,
    zero_moments,
)
from lrlora_ops.kernels._reduce import reduce_slabs
from lrlora_ops.kernels._tiles import dot_precision, padded_rank, row_major

# Columns that a program of sinc_gradients adds up: partial sums of d_b, one for each span, weigh little then.
_SPAN = 512


@triton.jit
def has_no_rows(
    group_offsets_ptr,  # [E + 1], unused unless GROUPED
    expert,
    GROUPED: tl.constexpr,
):
    """Whether there is nothing that the expert's weight is multiplied with."""
    is_idle = expert < 0
    if GROUPED:
        is_idle = tl.load(group_offsets_ptr + expert) == tl.load(group_offsets_ptr + expert + 1)
    return is_idle


@triton.jit
def sinc_weight_kernel(
    weight_ptr,  # [E, N, K]
    a_ptr,  # [E * R, K]
    b_ptr,  # [E * R, N]
    c_ptr,  # [2 REACH + 1] fp32
    out_ptr,  # [E, N, K], output
    group_offsets_ptr,  # [E + 1]
    rank,
    num_rows,
    num_cols,
    stride_we,
    stride_wn,
    inverse_grid,
    scaling,
    REACH: tl.constexpr,
    IS_NINE: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of the weight that the base product reads. Grid: (row tiles, column tiles, E)."""
    if has_no_rows(group_offsets_ptr, tl.program_id(2), GROUPED):
        return
    expert = tl.program_id(2).to(tl.int64)
    weight_ptr += expert * stride_we
    out_ptr += expert * num_rows * num_cols
    a_ptr += expert * rank * num_cols
    b_ptr += expert * rank * num_rows
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < num_rows, offs_k < num_cols
    mask = mask_n[:, None] & mask_k[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    weight = tl.load(weight_ptr + rows * stride_wn + offs_k[None, :], mask=mask, other=0.0)

    z = low_rank_tile(
        a_ptr, b_ptr, rank, offs_n, mask_n, offs_k, mask_k, num_rows, num_cols, weight.dtype, PRECISION,
        BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    w = z * inverse_grid
    if IS_NINE:
        curve = nine_sum(w, power_coefficients(c_ptr, REACH), REACH)
    else:
        curve = psi_sum(w, c_ptr, REACH)
    phi = z - tl.load(c_ptr + REACH) + curve
    out = weight.to(tl.float32) + scaling * phi
    tl.store(out_ptr + rows * num_cols + offs_k[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sinc_gradients_kernel(
    m_ptr,  # [E, N, K], output too if WRITES
    weight_ptr,  # [E, N, K], unused unless WRITES
    a_ptr,  # [E * R, K]
    b_ptr,  # [E * R, N]
    c_ptr,  # [2 REACH + 1] fp32
    d_a_ptr,  # [E, row tiles, WIDTH, K] fp32, output
    d_b_ptr,  # [E, spans, WIDTH, N] fp32, output
    d_c_ptr,  # [E, row tiles, spans, BLOCK_C] fp32, output
    group_offsets_ptr,  # [E + 1]
    rank,
    num_rows,
    num_cols,
    stride_we,
    stride_wn,
    inverse_grid,
    scaling,
    WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
    REACH: tl.constexpr,
    IS_NINE: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A span of SPAN tiles along K by BLOCK_N rows by BLOCK_R rank slots. Grid: (row tiles, spans, E * rank tiles)."""
    if has_no_rows(group_offsets_ptr, tl.program_id(2) // (WIDTH // BLOCK_R), GROUPED):
        return
    expert = (tl.program_id(2) // (WIDTH // BLOCK_R)).to(tl.int64)
    first_slot = tl.program_id(2) % (WIDTH // BLOCK_R) * BLOCK_R
    m_ptr += expert * num_rows * num_cols
    weight_ptr += expert * stride_we
    a_ptr += expert * rank * num_cols
    b_ptr += expert * rank * num_rows
    pid_n, span = expert * tl.num_programs(0) + tl.program_id(0), expert * tl.num_programs(1) + tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = first_slot + tl.arange(0, BLOCK_R)
    mask_n = offs_n < num_rows
    rows = offs_n.to(tl.int64)[:, None]
    first = tl.program_id(1) * SPAN * BLOCK_K
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    central = tl.load(c_ptr + REACH)
    b = load_factor(b_ptr, rank, offs_r, offs_n, mask_n, num_rows, dtype)

    d_b = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if IS_NINE:
        powers = power_coefficients(c_ptr, REACH)
        sums = zero_moments(REACH, BLOCK_N)  # threads meet once, at the end
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(first, tl.minimum(first + SPAN * BLOCK_K, num_cols), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < num_cols
        mask = mask_n[:, None] & mask_k[None, :]
        d = tl.load(m_ptr + rows * num_cols + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        a = load_factor(a_ptr, rank, offs_r, offs_k, mask_k, num_cols, dtype)
        if WIDTH == BLOCK_R:
            z = tl.dot(tl.trans(b), a, input_precision=PRECISION)
        else:
            z = low_rank_tile(
                a_ptr, b_ptr, rank, offs_n, mask_n, offs_k, mask_k, num_rows, num_cols, dtype, PRECISION,
                BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        w = z * inverse_grid
        if IS_NINE:
            curve, slope, sums = nine_gradients(w, d, powers, sums, REACH, BLOCK_N, BLOCK_K)
        else:
            curve, slope, sums = psi_gradients(w, d, c_ptr, REACH, sums, BLOCK_C)
        if WRITES:
            weight = tl.load(weight_ptr + rows * stride_wn + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            moved = weight + scaling * (z - central + curve)
            tl.debug_barrier()  # all of the tile's m have been read
            tl.store(m_ptr + rows * num_cols + offs_k[None, :], moved.to(dtype), mask=mask)

        d_z = (d + d * (slope * inverse_grid)).to(dtype)
        d_b = tl.dot(d_z, tl.trans(a), d_b, input_precision=PRECISION)
        d_a = tl.dot(tl.trans(d_z), tl.trans(b), input_precision=PRECISION)
        d_a_rows = (pid_n * WIDTH + offs_r)[None, :] * num_cols
        tl.store(d_a_ptr + d_a_rows + offs_k[:, None], d_a, mask=(offs_r < rank)[None, :] & mask_k[:, None])

    d_b_rows = (span * WIDTH + offs_r)[None, :] * num_rows
    tl.store(d_b_ptr + d_b_rows + offs_n[:, None], d_b, mask=(offs_r < rank)[None, :] & mask_n[:, None])
    if first_slot == 0:
        d_c_row = (pid_n * tl.num_programs(1) + tl.program_id(1)) * BLOCK_C
        if IS_NINE:
            d_c = of_coefficients(sums, REACH, BLOCK_C)
        else:
            d_c = tl.sum(sums, 0)
        tl.store(d_c_ptr + d_c_row + tl.arange(0, BLOCK_C), d_c)


def sinc_weight(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    dtype: torch.dtype,
    group_offsets: Tensor | None = None,
) -> Tensor:
    """``W + scaling * phi(b^T a)``, ``[N, K]`` in ``dtype``, for a ``[R, K]``, b ``[R, N]`` and fp32 c ``[2n + 1]``.

    Of experts: ``[E, N, K]``, a ``[E * R, K]`` and b ``[E * R, N]``; what is of an expert without rows is not set.
    """
    out = weight.new_empty(weight.shape, dtype=dtype)
    _write_weight(out, weight, a, b, c, grid, scaling, group_offsets)
    return out


def _write_weight(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    group_offsets: Tensor | None,
) -> None:
    if out.numel() == 0:
        return
    weight = _matrices(weight)
    num_experts, num_rows, num_cols = weight.shape
    rank = a.shape[0] // num_experts
    tile = tile_for("sinc_weight", padded_rank(rank), weight.dtype, num_rows, num_cols, len(c))
    sinc_weight_kernel[triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_cols, tile.block_n), num_experts](
        weight,
        a.contiguous(),
        b.contiguous(),
        c.contiguous(),
        out,
        group_offsets,
        rank,
        num_rows,
        num_cols,
        weight.stride(0),
        weight.stride(1),
        1 / grid,
        scaling,
        REACH=len(c) // 2,
        IS_NINE=len(c) <= NINE,
        GROUPED=group_offsets is not None,
        PRECISION=dot_precision(weight.dtype),
        BLOCK_N=tile.block_m,
        BLOCK_K=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )


def sinc_gradients(
    m: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    group_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contracts ``m = dy^T x`` ``[N, K]`` into d_a ``[R, K]``, d_b ``[R, N]`` and d_c ``[2n + 1]``, all in fp32.

    m itself becomes ``W + scaling * phi(b^T a)`` if ``weight`` is given, and is used up otherwise.
    Of experts: m ``[E, N, K]``, d_a ``[E * R, K]``, d_b ``[E * R, N]``; zeros for an expert without rows.
    """
    d_a, d_b, d_c = (torch.zeros(t.shape, dtype=torch.float32, device=m.device) for t in (a, b, c))
    if m.numel() == 0:
        return d_a, d_b, d_c
    num_experts, (num_rows, num_cols) = (1 if m.dim() == 2 else m.shape[0]), m.shape[-2:]
    rank = a.shape[0] // num_experts
    width = padded_rank(rank)
    tile = tile_for("sinc_gradients", width, m.dtype, num_rows, num_cols, len(c))
    span = triton.cdiv(_SPAN, tile.block_n)  # in tiles
    row_tiles, spans = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_cols, tile.block_n * span)
    rank_tiles, block_c = triton.cdiv(width, tile.block_r), max(16, triton.next_power_of_2(len(c)))
    d_a_partial = d_a.new_empty(num_experts * row_tiles, width, num_cols)
    d_b_partial = d_b.new_empty(num_experts * spans, width, num_rows)
    d_c_partial = d_c.new_zeros(num_experts * row_tiles * spans, block_c, 1)  # those without rows write nothing
    writes = weight is not None and rank_tiles == 1  # the programs of other slots would read what is written
    frozen = _matrices(weight if writes else m)
    sinc_gradients_kernel[row_tiles, spans, num_experts * rank_tiles](
        m,
        frozen,
        a.contiguous(),
        b.contiguous(),
        c.contiguous(),
        d_a_partial,
        d_b_partial,
        d_c_partial,
        group_offsets,
        rank,
        num_rows,
        num_cols,
        frozen.stride(0),
        frozen.stride(1),
        1 / grid,
        scaling,
        WIDTH=width,
        WRITES=writes,
        REACH=len(c) // 2,
        IS_NINE=len(c) <= NINE,
        GROUPED=group_offsets is not None,
        PRECISION=dot_precision(m.dtype),
        SPAN=span,
        BLOCK_C=block_c,
        BLOCK_N=tile.block_m,
        BLOCK_K=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )
    ranks, components = _owned(rank, group_offsets, m)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=m.device)
    for partial, d, slabs in ((d_a_partial, d_a, row_tiles), (d_b_partial, d_b, spans)):
        slab_offsets = None if group_offsets is None else experts * slabs
        reduce_slabs(partial, d, ranks, scaling, None, components, slab_offsets)
    of_all = torch.full((1,), len(c), dtype=torch.int32, device=m.device)
    reduce_slabs(d_c_partial, d_c[:, None], of_all, scaling, None, None, None)
    if weight is not None and not writes:
        _write_weight(m, weight, a, b, c, grid, scaling, group_offsets)
    return d_a, d_b, d_c


def _matrices(weight: Tensor) -> Tensor:
    """``[E, N, K]`` with rows that a kernel can step along; a dense layer's is of one expert."""
    return row_major(weight if weight.dim() == 3 else weight[None])


def _owned(rank: int, group_offsets: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ranks ``[E]``, 0 for an expert without rows, and its components ``[E, R]``, in order; None for one expert."""
    if group_offsets is None:
        return torch.full((1,), rank, dtype=torch.int32, device=like.device), None
    num_experts = group_offsets.shape[0] - 1
    components = torch.arange(num_experts * rank, dtype=torch.int32, device=like.device)
    return (group_offsets.diff() > 0).to(torch.int32) * rank, components.view(num_experts, rank)
