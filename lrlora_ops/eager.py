"""The primitives in PyTorch: what CPU tensors run on.

Same names, arguments and meanings as the launchers in ``kernels/``. The rank is read on the host, which is free
on a CPU, and dead components are skipped. Each function is a custom op, so that a changed rank is invisible to
``torch.compile``.

BLAS may order a sum differently for another matrix shape. Components are therefore worked on in the fixed
segments 0..16, 16..32, 32..64, 64..128 and so on: a component that is born leaves the shapes that the others
see unchanged, and with a zero row of ``b`` it leaves the output bit-identical.

Rows are worked on in blocks that stay in a core's cache: what has to be read twice is read from memory once, and
half precision is widened to fp32 on the way where the CPU has no instructions for it.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_SEGMENT = 16
# A block takes 2 MB in fp32, about a core's share of the caches, and has rows enough for BLAS to be quick.
_BLOCK_ELEMENTS, _BLOCK_ROWS = 2**19, 128
# Of a weight that is widened at a time: 16 MB in fp32, to be used by many rows; for fewer it does not pay.
_WEIGHT_ELEMENTS, _WIDENED_ROWS = 2**22, 32
# torch.cpu.get_capabilities is younger than the oldest torch that is supported.
_CPU: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
_MULTIPLIES_BF16 = any(_CPU.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _segments(rank: int, max_rank: int) -> Iterator[tuple[int, int]]:
    """Column ranges that cover ``rank`` components; their bounds do not depend on the rank."""
    low, high = 0, min(_SEGMENT, max_rank)
    while low < rank:
        yield low, high
        low, high = high, min(2 * high, max_rank)


def _experts(
    ranks: Tensor, max_rank: int, group_offsets: Tensor | None, num_rows: int
) -> Iterator[tuple[int, slice, int]]:
    """(expert, its rows, its rank) for each expert that has both."""
    offsets = [0, num_rows] if group_offsets is None else group_offsets.tolist()
    for expert, rank in enumerate(ranks.tolist()):
        if not 0 <= rank <= max_rank:
            raise ValueError(f"the rank of expert {expert} is {rank}; it must be from 0 to {max_rank}, the capacity")
        if rank and offsets[expert + 1] > offsets[expert]:
            yield expert, slice(offsets[expert], offsets[expert + 1]), rank


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: its own dtype if the CPU can, else fp32."""
    own = x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and _MULTIPLIES_BF16)
    return x.dtype if own else torch.float32


def widens(x: Tensor) -> bool:
    """Whether x is multiplied in another dtype than its own."""
    return _compute_dtype(x) != x.dtype


def _row_blocks(
    x: Tensor, rows: slice, compute: torch.dtype, reread: bool, row_index: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(block of rows, what x has there in ``compute``); all rows at once unless that is widened or read repeatedly."""
    size, widened = rows.stop - rows.start, compute != x.dtype
    if reread or widened:
        size = min(size, max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(x.shape[1], 1)) * torch.get_num_threads())
    buffer = x.new_empty(size if widened else 0, x.shape[1], dtype=compute)
    for first in range(rows.start, rows.stop, size):
        block = slice(first, min(first + size, rows.stop))
        x_rows = x[block] if row_index is None else x[row_index[block]]
        yield block, buffer[: x_rows.shape[0]].copy_(x_rows) if widened else x_rows


def _pool_index(components: Tensor | None, expert: int, low: int, high: int) -> slice | Tensor:
    """Pool rows of an expert's components low..high; a dense layer owns its pool in order."""
    return slice(low, high) if components is None else components[expert, low:high].long()


def _segment_rows(
    pool: Tensor,
    components: Tensor | None,
    expert: int,
    rank: int,
    max_rank: int,
    compute: torch.dtype,
    gate: Tensor | None,
) -> list[tuple[slice, Tensor]]:
    """(rank slots, their gated pool rows) by segment; zero rows stand for dead components, which are never read."""
    segments = []
    for low, high in _segments(rank, max_rank):
        index = _pool_index(components, expert, low, min(high, rank))
        rows = (pool[index] if gate is None else pool[index] * gate[index, None]).to(compute)
        missing = high - low - rows.shape[0]
        segments.append((slice(low, high), F.pad(rows, (0, 0, 0, missing)) if missing else rows))
    return segments


@torch.library.custom_op("lrlora_eager::shrink", mutates_args=())
def shrink(
    x: Tensor,
    a: Tensor,
    ranks: Tensor,
    max_rank: int,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """``u[i, j] = <x[i], a[comp(e_i, j)]>``, 0 beyond the rank; ``[L, max_rank]`` in x's dtype."""
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    u = x.new_zeros(num_rows, max_rank)
    compute = _compute_dtype(x)
    for expert, rows, rank in _experts(ranks, max_rank, group_offsets, num_rows):
        segments = _segment_rows(a, components, expert, rank, max_rank, compute, None)
        for block, x_rows in _row_blocks(x, rows, compute, max_rank > _SEGMENT, row_index):
            for slots, rows_of_a in segments:
                u[block, slots] = x_rows @ rows_of_a.t()
    return u


@shrink.register_fake
def _(x, a, ranks, max_rank, components=None, group_offsets=None, row_index=None):
    return x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], max_rank)


@torch.library.custom_op("lrlora_eager::expand_", mutates_args={"out"})
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
    """``out[i] += scaling * sum_j gate_j u[i, j] b[comp(e_i, j)]`` in place; out is ``[L, N]``."""
    compute = _compute_dtype(out)
    for expert, rows, rank in _experts(ranks, u.shape[1], group_offsets, out.shape[0]):
        segments = _segment_rows(b, components, expert, rank, u.shape[1], compute, gate)
        for block, total in _row_blocks(out, rows, compute, u.shape[1] > _SEGMENT):
            for slots, rows_of_b in segments:
                total.addmm_(u[block, slots].to(compute), rows_of_b, alpha=scaling)
            if compute != out.dtype:
                out[block] = total


@torch.library.custom_op("lrlora_eager::expand", mutates_args=())
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
    out = u.new_zeros(u.shape[0], b.shape[1]) if base is None else base.clone(memory_format=torch.contiguous_format)
    if group_offsets is not None:
        out[int(group_offsets[-1]) :] = 0
    expand_(out, u, b, ranks, scaling, gate, components, group_offsets)
    return out


@expand.register_fake
def _(u, b, ranks, scaling, gate=None, components=None, group_offsets=None, base=None):
    return (u if base is None else base).new_empty(u.shape[0], b.shape[1])


@torch.library.custom_op("lrlora_eager::gram", mutates_args=())
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
    """``d[comp(e, j)] = scaling * gate_j * sum_{i in e} u[i, j] y[i]``; ``[pool_size, N]`` in ``dtype``, 0 if dead."""
    d = torch.zeros(pool_size, y.shape[1], dtype=dtype, device=y.device)
    compute = _compute_dtype(y)
    for expert, rows, rank in _experts(ranks, u.shape[1], group_offsets, u.shape[0]):
        total = torch.zeros(rank, y.shape[1], dtype=compute, device=y.device)
        for block, y_rows in _row_blocks(y, rows, compute, False, row_index):
            total.addmm_(u[block, :rank].to(compute).t(), y_rows)
        _store_gram(d, total, _pool_index(components, expert, 0, rank), scaling, gate)
    return d


def _store_gram(d: Tensor, total: Tensor, index: slice | Tensor, scaling: float, gate: Tensor | None) -> None:
    d[index] = (total * scaling if gate is None else total * (scaling * gate[index, None])).to(d.dtype)


@gram.register_fake
def _(u, y, ranks, pool_size, scaling, dtype, gate=None, components=None, group_offsets=None, row_index=None):
    return y.new_empty(pool_size, y.shape[1], dtype=dtype)


@torch.library.custom_op("lrlora_eager::shrink_gram", mutates_args=())
def shrink_gram(
    dy: Tensor,
    b: Tensor,
    u: Tensor,
    ranks: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    components: Tensor | None = None,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``v = shrink(dy, b)``, ``d_b = gram(u, dy)`` and ``c[comp(e, j)] = scaling * sum_i u[i, j] v[i, j]``.

    ``row_index`` gathers rows of dy. c is ``[R]`` in fp32 (fp64 for fp64 inputs).
    """
    v, d_b = dy.new_zeros(u.shape), b.new_zeros(b.shape)
    c = torch.zeros(b.shape[0], dtype=_sum_dtype(dy), device=dy.device)
    compute = _compute_dtype(dy)
    for expert, rows, rank in _experts(ranks, u.shape[1], group_offsets, u.shape[0]):
        segments = _segment_rows(b, components, expert, rank, u.shape[1], compute, None)
        total = torch.zeros(rank, dy.shape[1], dtype=compute, device=dy.device)
        for block, dy_rows in _row_blocks(dy, rows, compute, compute != torch.bfloat16, row_index):
            for slots, rows_of_b in segments:
                v[block, slots] = dy_rows @ rows_of_b.t()
            total.addmm_(u[block, :rank].to(compute).t(), dy_rows)
        index = _pool_index(components, expert, 0, rank)
        _store_gram(d_b, total, index, scaling, gate)
        c[index] = scaling * (u[rows, :rank].to(c.dtype) * v[rows, :rank].to(c.dtype)).sum(0)
    return v, d_b, c


@shrink_gram.register_fake
def _(dy, b, u, ranks, scaling, gate=None, components=None, group_offsets=None, row_index=None):
    return dy.new_empty(u.shape), b.new_empty(b.shape), dy.new_empty(b.shape[0], dtype=_sum_dtype(dy))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("lrlora_eager::grouped_gemm", mutates_args=())
def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    group_offsets: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """``y[i] = W[e_i] x[row_index[i]] + bias[e_i]``, ``[L, N]`` in x's dtype; rows of no expert are zero.

    ``weight`` is ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``.
    """
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    matrices = weight if transposed else weight.transpose(1, 2)
    offsets = [0, num_rows] if group_offsets is None else group_offsets.tolist()
    y = x.new_empty(num_rows, matrices.shape[2])
    y[offsets[-1] :] = 0
    for expert, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            rows = slice(first, last)
            _gemm(y[rows], x, rows, matrices[expert], None if bias is None else bias[expert], row_index)
    return y


def _gemm(y: Tensor, x: Tensor, rows: slice, matrix: Tensor, bias: Tensor | None, row_index: Tensor | None) -> None:
    """``y = x[rows] @ matrix + bias`` for ``matrix`` ``[K, N]``, widened by blocks of columns where that is faster."""
    compute = _compute_dtype(x)
    if compute == x.dtype or len(y) < _WIDENED_ROWS:
        x_rows = x[rows] if row_index is None else x[row_index[rows]]
        torch.mm(x_rows, matrix, out=y) if bias is None else torch.addmm(bias, x_rows, matrix, out=y)
        return
    columns = max(_WEIGHT_ELEMENTS // max(matrix.shape[0], 1), 1)
    for low in range(0, matrix.shape[1], columns):
        part = slice(low, low + columns)
        wide, wide_bias = matrix[:, part].to(compute), None if bias is None else bias[part].to(compute)
        for block, x_rows in _row_blocks(x, rows, compute, False, row_index):
            out = y[block.start - rows.start : block.stop - rows.start, part]
            out.copy_(x_rows @ wide if wide_bias is None else torch.addmm(wide_bias, x_rows, wide))


@grouped_gemm.register_fake
def _(x, weight, bias=None, transposed=False, group_offsets=None, row_index=None):
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    return x.new_empty(num_rows, weight.shape[2 if transposed else 1])


@torch.library.custom_op("lrlora_eager::combine", mutates_args=())
def combine(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """``out[t] = sum_k weights[t, k] rows[positions[t, k]]``, ``[T, N]`` in rows' dtype, summed in fp32 or wider."""
    out = torch.zeros(positions.shape[0], rows.shape[1], dtype=_sum_dtype(rows), device=rows.device)
    for k, position in enumerate(positions.unbind(1)):
        chosen = rows[position].to(out.dtype)
        if weights is None:
            out.add_(chosen)
        else:
            out.addcmul_(chosen, weights[:, k, None].to(out.dtype))
    return out.to(rows.dtype)


@combine.register_fake
def _(rows, positions, weights=None):
    return rows.new_empty(positions.shape[0], rows.shape[1])


def _keep(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The dropout factor of each element, 0 or 1 / (1 - p), drawn from the seed alone."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p, generator=generator).div_(1 - p)


@torch.library.custom_op("lrlora_eager::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``keep * x / (1 - p)``; the mask follows from ``seed`` (int64 ``[]``) and the shape, and is not stored."""
    return _keep(x, seed, p).mul_(x)


@dropout.register_fake
def _(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lrlora_eager::dropout_add_", mutates_args={"out"})
def dropout_add_(out: Tensor, x: Tensor, seed: Tensor, p: float) -> None:
    """``out += dropout(x)`` with the mask that ``dropout`` draws from the same seed and shape."""
    out.addcmul_(_keep(x, seed, p), x)
