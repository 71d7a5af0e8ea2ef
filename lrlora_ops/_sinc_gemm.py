"""sinc_gemm and its backward pass in PyTorch: an expert at a time, and a block of rows of its weight at a time.

No more of a moved weight than a block exists at a time. Experts without rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lrlora_ops._sinc import sinc_gradients, sinc_weight

# Rows of the weight that are made at a time: 16 MB in fp32, and enough for a quick product.
_BLOCK_ELEMENTS, _BLOCK_ROWS = 2**22, 64


@torch.library.custom_op("lrlora_eager::sinc_gemm", mutates_args=())
def sinc_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    group_offsets: Tensor | None,
    row_index: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """``y[i] = (W[e_i] + scaling * phi(b_e^T a_e)) x[row_index[i]] + bias[e_i]``, ``[L, N]`` in x's dtype.

    ``weight`` is ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; a is ``[E * R, K]``, b ``[E * R, N]``. ``dtype`` is
    what x and the weight are multiplied in. Rows of no expert are zero.
    """
    y = x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], b.shape[1])
    for expert, rows in _groups(group_offsets, y):
        frozen, (own_a, own_b) = _matrix(weight, expert, transposed), _own(expert, len(weight), a, b)
        x_rows = _rows(x, row_index, rows).to(dtype)
        for part in _blocks(frozen):
            moved = sinc_weight(frozen[part], own_a, own_b[:, part], c, grid, scaling, dtype)
            out = _target(y[rows, part], dtype)
            if bias is None:
                torch.mm(x_rows, moved.t(), out=out)
            else:  # rounded once, with the product
                torch.addmm(bias[expert, part].to(dtype), x_rows, moved.t(), out=out)
            if y.dtype != dtype:
                y[rows, part] = out
    return y


@sinc_gemm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    group_offsets: Tensor | None,
    row_index: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], b.shape[1])


@torch.library.custom_op("lrlora_eager::sinc_gemm_backward", mutates_args=())
def sinc_gemm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    group_offsets: Tensor | None,
    dy_index: Tensor | None,
    x_index: Tensor | None,
    row_weights: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    dtype: torch.dtype,
    needs_rows: bool,
    needs_low_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_rows ``[L, K]`` in x's dtype, and d_a, d_b, d_c in fp32 or fp64; what is not needed has no elements.

    ``dy_index`` and ``x_index`` gather rows of dy and of x. ``row_weights`` ``[L]`` are factors of the sorted rows in
    the gradients of a, b and c, but not in d_rows.
    """
    sums = torch.promote_types(dtype, torch.float32)
    num_rows = x.shape[0] if x_index is None else x_index.shape[0]
    d_rows = x.new_empty((num_rows, x.shape[1]) if needs_rows else 0)
    d_a, d_b, d_c = (t.new_zeros(t.shape if needs_low_rank else 0, dtype=sums) for t in (a, b, c))
    for expert, rows in _groups(group_offsets, d_rows if needs_rows else num_rows):
        frozen, (own_a, own_b) = _matrix(weight, expert, transposed), _own(expert, len(weight), a, b)
        dy_rows, x_rows = _rows(dy, dy_index, rows).to(dtype), None
        if needs_low_rank:
            x_rows = _rows(x, x_index, rows).to(dtype)
            x_rows = x_rows if row_weights is None else (x_rows * row_weights[rows, None]).to(dtype)
            own_d_a, own_d_b = _own(expert, len(weight), d_a, d_b)
        total = _target(d_rows[rows], dtype) if needs_rows else None
        for part in _blocks(frozen):
            low_rank = (own_a, own_b[:, part], c, grid, scaling)
            if x_rows is not None:
                moved = dy_rows[:, part].t() @ x_rows  # and then the weight, in the same memory
                parts = sinc_gradients(moved, frozen[part] if needs_rows else None, *low_rank)
                own_d_a += parts[0]
                own_d_b[:, part] = parts[1]
                d_c += parts[2]
            else:
                moved = sinc_weight(frozen[part], *low_rank, dtype)
            if total is not None:
                torch.addmm(total, dy_rows[:, part], moved, beta=min(part.start, 1), out=total)
        if total is not None and total.dtype != d_rows.dtype:
            d_rows[rows] = total
    return d_rows, d_a, d_b, d_c


@sinc_gemm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    group_offsets: Tensor | None,
    dy_index: Tensor | None,
    x_index: Tensor | None,
    row_weights: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    grid: float,
    scaling: float,
    dtype: torch.dtype,
    needs_rows: bool,
    needs_low_rank: bool,
) -> tuple[Tensor, ...]:
    sums = torch.promote_types(dtype, torch.float32)
    num_rows = x.shape[0] if x_index is None else x_index.shape[0]
    d_rows = x.new_empty((num_rows, x.shape[1]) if needs_rows else 0)
    return d_rows, *(t.new_empty(t.shape if needs_low_rank else 0, dtype=sums) for t in (a, b, c))


def _groups(group_offsets: Tensor | None, out: Tensor | int) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which these are; rows of no expert become zero in ``out``."""
    num_rows = out if isinstance(out, int) else len(out)
    offsets = [0, num_rows] if group_offsets is None else group_offsets.tolist()
    if isinstance(out, Tensor):
        out[offsets[-1] :].zero_()
    for expert, (first, end) in enumerate(pairwise(offsets)):
        if first < end:
            yield expert, slice(first, end)


def _matrix(weight: Tensor, expert: int, transposed: bool) -> Tensor:
    """``[N, K]``"""
    return weight[expert].t() if transposed else weight[expert]


def _own(expert: int, num_experts: int, *pools: Tensor) -> list[Tensor]:
    """The expert's rows of each pool."""
    ranks = (len(pool) // num_experts for pool in pools)
    return [pool[expert * rank : (expert + 1) * rank] for pool, rank in zip(pools, ranks, strict=True)]


def _rows(x: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if index is None else x.index_select(0, index[rows])


def _target(out: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product in ``dtype`` is written to: out, or memory for it that is then rounded."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight ``[N, K]`` that are made and multiplied at a time."""
    num_rows, num_cols = weight.shape
    size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(num_cols, 1))
    return (slice(first, first + size) for first in range(0, max(num_rows, 1), size))
