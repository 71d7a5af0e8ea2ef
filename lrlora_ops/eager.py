"""The primitives in PyTorch: what CPU tensors run on.

Same names, arguments and meanings as the launchers in ``kernels/``. The rank is read on the host, which is free
on a CPU, and dead components are skipped. Each function is a custom op, so that a changed rank is invisible to
``torch.compile``.

Where the CPU is no faster in half precision, rows are widened to fp32 in blocks that stay in a core's cache.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lrlora_ops._gated import ACTIVATIONS, gated_activation, gated_activation_backward  # noqa: F401
from lrlora_ops._live import BLOCK_ELEMENTS, Expert, Work, find_work, row_blocks, runs
from lrlora_ops._sinc import sinc_gradients, sinc_weight  # noqa: F401
from lrlora_ops._sinc_gemm import sinc_gemm, sinc_gemm_backward  # noqa: F401

# Of a block that is widened: enough for BLAS to be quick.
_BLOCK_ROWS = 128
# Of rows that two products read, or one reads column by column: BLAS is slower with fewer, the cache with more.
_REUSED_ROWS = 512
# Of a weight that is widened at a time: 16 MB in fp32, to be used by many rows; for fewer it does not pay.
_WEIGHT_ELEMENTS, _WIDENED_ROWS = 2**22, 32
# torch.cpu.get_capabilities is younger than the oldest torch that is supported.
_CPU: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
# Not avx512_bf16: the CPU with that alone that was measured (2026-11-22: 166 GFLOP/s, fp32 330) is quicker in fp32.
_MULTIPLIES_BF16 = any(_CPU.get(name) for name in ("amx_bf16", "bf16"))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: its own dtype if the CPU can, else fp32."""
    own = x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and _MULTIPLIES_BF16)
    return x.dtype if own else torch.float32


def widens(x: Tensor) -> bool:
    """Whether x is multiplied in another dtype than its own."""
    return _compute_dtype(x) != x.dtype


def _blocks(
    compute: torch.dtype, x_rows: Tensor, *others: Tensor, reused: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """x_rows in ``compute`` and the same rows of the others: all at once, unless many are to be widened or reused."""
    size = _REUSED_ROWS if reused else x_rows.shape[0]
    if compute != x_rows.dtype:
        size = max(_BLOCK_ROWS, BLOCK_ELEMENTS // max(x_rows.shape[1], 1)) * torch.get_num_threads()
    if x_rows.shape[0] <= size:
        yield x_rows.to(compute), *others
        return
    for block, *parts in zip(*(rows.split(size) for rows in (x_rows, *others)), strict=True):
        yield block.to(compute), *parts


class _Rows:
    """The rows of each expert, gathered when they are asked for."""

    def __init__(self, x: Tensor, work: Work, row_index: Tensor | None) -> None:
        self.x, self.gathers = x, row_index is not None
        self.parts = work.rows(x if row_index is None else row_index)

    def __getitem__(self, expert: Expert) -> Tensor:
        part = self.parts[expert.index]
        return self.x.index_select(0, part) if self.gathers else part


class _Pool:
    """The pool rows of each expert's segments; gathered, when they are asked for, unless they follow each other."""

    def __init__(self, pool: Tensor, work: Work, components: Tensor | None, compute: torch.dtype) -> None:
        self.pool, self.compute = pool, compute
        index = work.pool_index(components)
        starts, parts = runs(index, work.widths), torch.split_with_sizes(index, work.widths)
        self.parts = [
            part if start is None else slice(start, start + width)
            for start, part, width in zip(starts, parts, work.widths, strict=True)
        ]

    def __getitem__(self, expert: Expert) -> list[Tensor]:
        return [self._rows(self.parts[piece]) for piece in expert.pieces]

    def _rows(self, part: Tensor | slice) -> Tensor:
        rows = self.pool[part] if isinstance(part, slice) else self.pool.index_select(0, part)
        return rows if rows.dtype == self.compute else rows.to(self.compute)


def _gated(
    u: Tensor, gate: Tensor | None, scaling: float, work: Work, components: Tensor | None, compute: torch.dtype
) -> Tensor:
    """``scaling * gate * u`` in ``compute`` for the rows that have an expert."""
    factors = scaling if gate is None else work.by_row(work.of_slots(gate, components) * scaling)
    return (u[: work.num_rows].to(_sum_dtype(u)) * factors).to(compute)


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
    compute, work = _compute_dtype(x), find_work(ranks, max_rank, group_offsets, num_rows)
    u = x.new_zeros(num_rows, max_rank, dtype=compute)
    rows, pool, columns = _Rows(x, work, row_index), _Pool(a, work, components, compute), work.columns(u)
    for expert in work.ranked:
        segments = pool[expert]
        for x_rows, *pieces in _blocks(compute, rows[expert], *columns[expert.index]):
            _shrink_rows(pieces, x_rows, segments)
    return _without_dead(u, work).to(x.dtype)


def _shrink_rows(pieces: list[Tensor], x_rows: Tensor, segments: list[Tensor]) -> None:
    for piece, pool_rows in zip(pieces, segments, strict=True):
        torch.mm(x_rows, pool_rows.t(), out=piece)


def _without_dead(u: Tensor, work: Work) -> Tensor:
    """u, made zero in the dead slots of segments."""
    if not work.all_live:
        is_live = work.by_row(work.position == work.slot)
        u[: work.num_rows].masked_fill_(~is_live, 0)
    return u


@shrink.register_fake
def _(x, a, ranks, max_rank, components=None, group_offsets=None, row_index=None):
    return x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], max_rank)


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
    """``out[i] = base[i] + scaling * sum_j gate_j u[i, j] b[comp(e_i, j)]``, ``[L, N]`` in base's dtype (or u's).

    Without ``base`` it is zero. Rows of no expert are zero.
    """
    out = u.new_empty(u.shape[0], b.shape[1]) if base is None else base.clone(memory_format=torch.contiguous_format)
    compute, work = _compute_dtype(out), find_work(ranks, u.shape[1], group_offsets, u.shape[0])
    gated, pool = _gated(u, gate, scaling, work, components, compute), _Pool(b, work, components, compute)
    out[work.num_rows :].zero_()
    _expand_rows(out, gated, pool, work, is_set=base is not None)
    return out


def _expand_rows(out: Tensor, gated: Tensor, pool: _Pool, work: Work, is_set: bool) -> None:
    """Add each expert's low-rank product to its rows of out, or overwrite them if out is not set."""
    rows, columns = work.rows(out), work.columns(gated)
    for expert in work.ranked if is_set else work.experts:
        segments = pool[expert]
        if not segments:
            rows[expert.index].zero_()
            continue
        for total, out_rows, *pieces in _blocks(gated.dtype, *[rows[expert.index]] * 2, *columns[expert.index]):
            _add_segments(total, pieces, segments, is_set)
            if total.dtype != out.dtype:
                out_rows.copy_(total)


def _add_segments(total: Tensor, pieces: list[Tensor], segments: list[Tensor], is_set: bool) -> None:
    for piece, pool_rows in zip(pieces, segments, strict=True):
        total.addmm_(piece, pool_rows, beta=1 if is_set else 0)
        is_set = True


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
    compute, work = _compute_dtype(y), find_work(ranks, u.shape[1], group_offsets, u.shape[0])
    d = y.new_zeros(pool_size, y.shape[1], dtype=dtype)
    rows, left = _Rows(y, work, row_index), work.rows(_gated(u, gate, scaling, work, components, compute))
    for expert, total in _totals(d, work, components, compute):
        for y_rows, u_rows in _blocks(compute, rows[expert], left[expert.index][:, : expert.rank], reused=True):
            total.addmm_(u_rows.t(), y_rows)
    return d


def _totals(d: Tensor, work: Work, components: Tensor | None, compute: torch.dtype) -> Iterator[tuple[Expert, Tensor]]:
    """Each ranked expert with zeros ``[rank, N]`` to sum its rows of d in; they are in d once the next is asked for."""
    ranks, index = [expert.rank for expert in work.ranked], work.live_index(components)
    parts = zip(work.ranked, runs(index, ranks), torch.split_with_sizes(index, ranks), strict=True)
    for expert, start, own in parts:
        if start is not None and d.dtype == compute:
            yield expert, d[start : start + expert.rank]
            continue
        total = d.new_zeros(expert.rank, d.shape[1], dtype=compute)
        yield expert, total
        d.index_copy_(0, own, total.to(d.dtype))


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
    compute, work = _compute_dtype(dy), find_work(ranks, u.shape[1], group_offsets, u.shape[0])
    v, d_b = dy.new_zeros(u.shape, dtype=compute), b.new_zeros(b.shape)
    rows, pool, columns = _Rows(dy, work, row_index), _Pool(b, work, components, compute), work.columns(v)
    left = work.rows(_gated(u, gate, scaling, work, components, compute))
    for expert, total in _totals(d_b, work, components, compute):
        segments = pool[expert]
        operands = (rows[expert], left[expert.index][:, : expert.rank], *columns[expert.index])
        for dy_rows, u_rows, *pieces in _blocks(compute, *operands, reused=True):
            _shrink_rows(pieces, dy_rows, segments)
            total.addmm_(u_rows.t(), dy_rows)
    v = _without_dead(v, work).to(dy.dtype)
    return v, d_b, _sensitivity(u, v, scaling, work, components, b.shape[0])


def _sensitivity(u: Tensor, v: Tensor, scaling: float, work: Work, components: Tensor | None, pool_size: int) -> Tensor:
    """``c[comp(e, j)] = scaling * sum_{i in e} u[i, j] v[i, j]``, ``[pool_size]``."""
    dtype = _sum_dtype(v)
    c, products = v.new_zeros(pool_size, dtype=dtype), work.rows(u.to(dtype) * v.to(dtype))
    sums = [products[expert.index].sum(0)[: expert.rank] for expert in work.ranked]
    return c.index_copy_(0, work.live_index(components), scaling * torch.cat(sums)) if sums else c


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
    u: Tensor | None = None,
    b: Tensor | None = None,
    ranks: Tensor | None = None,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    components: Tensor | None = None,
) -> Tensor:
    """``y[i] = W[e_i] x[row_index[i]] + bias[e_i]``, plus ``expand(u, b, ...)`` if u is given; ``[L, N]`` in x's dtype.

    ``weight`` is ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``. Rows of no expert are zero.
    """
    matrices = (weight if transposed else weight.transpose(1, 2)).unbind()
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    if u is None or b is None or ranks is None:  # all experts of rank 0
        u, b = x.new_zeros(num_rows, 0), x.new_zeros(0, matrices[0].shape[1])
        ranks, gate, components = torch.zeros(len(matrices), dtype=torch.int32), None, None
    compute, work = _compute_dtype(x), find_work(ranks, u.shape[1], group_offsets, num_rows)
    gated, pool = _gated(u, gate, scaling, work, components, compute), _Pool(b, work, components, compute)
    biases = [None] * len(matrices) if bias is None else bias.unbind()
    y = x.new_empty(num_rows, matrices[0].shape[1])
    y[work.num_rows :].zero_()
    rows, y_rows = _Rows(x, work, row_index), work.rows(y)
    if compute == x.dtype:
        _expand_rows(y, gated, pool, work, is_set=False)
        for expert in work.experts:
            _add_product(y_rows[expert.index], rows[expert], matrices[expert.index], biases[expert.index])
    else:
        columns, wide = work.columns(gated), _wide_block(matrices[0])
        for expert in work.experts:
            own = (rows[expert], y_rows[expert.index], *columns[expert.index])
            _widened_product(own, matrices[expert.index], biases[expert.index], pool[expert], wide)
    return y


def _add_product(y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        y.add_(bias)
    y.addmm_(x, matrix)


def _wide_block(matrix: Tensor) -> Tensor:
    """Memory in fp32 for a block of columns of such a matrix: one for all experts, so that its pages stay."""
    columns = min(max(_WEIGHT_ELEMENTS // max(matrix.shape[0], 1), 1), matrix.shape[1])
    return torch.empty_like(matrix[:, :columns], dtype=torch.float32)


def _widened_product(
    rows: tuple[Tensor, ...], matrix: Tensor, bias: Tensor | None, segments: list[Tensor], wide: Tensor
) -> None:
    """``y = x @ matrix + bias`` plus the products of pieces and segments, for rows of (x, y, pieces).

    Where many rows make use of it, they and blocks of columns of the matrix are widened to fp32, these in ``wide``.
    """
    few = len(rows[0]) < _WIDENED_ROWS
    compute = rows[0].dtype if few else torch.float32
    size = max(matrix.shape[1] if few else wide.shape[1], 1)
    for low in range(0, matrix.shape[1], size):
        part = slice(low, low + size)
        block = matrix[:, part]
        if not few:
            block = wide[:, : block.shape[1]].copy_(block)
        for x, y, *pieces in _blocks(compute, *rows):
            total = (x @ block).to(torch.float32)
            if bias is not None:
                total.add_(bias[part])
            _add_segments(total, pieces, [pool_rows[:, part] for pool_rows in segments], is_set=True)
            y[:, part] = total


@grouped_gemm.register_fake
def _(
    x, weight, bias=None, transposed=False, group_offsets=None, row_index=None,
    u=None, b=None, ranks=None, scaling=1.0, gate=None, components=None,
):  # fmt: skip
    num_rows = x.shape[0] if row_index is None else row_index.shape[0]
    return x.new_empty(num_rows, weight.shape[2 if transposed else 1])


@torch.library.custom_op("lrlora_eager::combine", mutates_args=())
def combine(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """``out[t] = sum_k weights[t, k] rows[positions[t, k]]``, ``[T, N]`` in rows' dtype, summed in fp32 or wider."""
    out = rows.new_empty(positions.shape[0], rows.shape[1])
    for tokens in row_blocks(*out.shape):
        out[tokens] = _weighted_sum(rows, positions[tokens], None if weights is None else weights[tokens])
    return out


def _weighted_sum(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    out = torch.zeros(positions.shape[0], rows.shape[1], dtype=_sum_dtype(rows), device=rows.device)
    for k, position in enumerate(positions.unbind(1)):
        chosen = rows.index_select(0, position).to(out.dtype)
        if weights is None:
            out.add_(chosen)
        else:
            out.addcmul_(chosen, weights[:, k, None].to(out.dtype))
    return out


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
