"""The primitives in PyTorch: what CPU tensors run on.

Same names, arguments and meanings as the launchers in ``kernels/``. The rank is read on the host, which is free
on a CPU, and dead components are skipped. Each function is a custom op, so that a changed rank is invisible to
``torch.compile``.

Where the CPU has no instructions for half precision, rows are widened to fp32 in blocks that stay in a core's cache.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from lrlora_ops._live import Expert, live_experts, padded_rows, pool_index

# A block takes 2 MB in fp32, about a core's share of the caches, and has rows enough for BLAS to be quick.
_BLOCK_ELEMENTS, _BLOCK_ROWS = 2**19, 128
# Of a weight that is widened at a time: 16 MB in fp32, to be used by many rows; for fewer it does not pay.
_WEIGHT_ELEMENTS, _WIDENED_ROWS = 2**22, 32
# torch.cpu.get_capabilities is younger than the oldest torch that is supported.
_CPU: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
_MULTIPLIES_BF16 = any(_CPU.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: its own dtype if the CPU can, else fp32."""
    own = x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and _MULTIPLIES_BF16)
    return x.dtype if own else torch.float32


def widens(x: Tensor) -> bool:
    """Whether x is multiplied in another dtype than its own."""
    return _compute_dtype(x) != x.dtype


def _row_blocks(
    x: Tensor, rows: slice, compute: torch.dtype, row_index: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(block of rows, what x has there in ``compute``): all rows at once, unless many have to be widened."""
    num_rows = size = rows.stop - rows.start
    if compute != x.dtype:
        size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(x.shape[1], 1)) * torch.get_num_threads()
    if num_rows <= size:
        yield rows, _rows(x, rows, row_index).to(compute)
        return
    buffer = x.new_empty(size, x.shape[1], dtype=compute)
    for first in range(rows.start, rows.stop, size):
        block = slice(first, min(first + size, rows.stop))
        yield block, buffer[: block.stop - first].copy_(_rows(x, block, row_index))


def _rows(x: Tensor, rows: slice, row_index: Tensor | None) -> Tensor:
    return x[rows] if row_index is None else x.index_select(0, row_index[rows])


def _gated(u: Tensor, gate: Tensor | None, components: slice, compute: torch.dtype) -> Tensor:
    """Columns of u, in ``compute``, times the gates of these components."""
    return (u if gate is None else u * gate[components]).to(compute)


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
    compute, experts = _compute_dtype(x), live_experts(ranks, max_rank, group_offsets, num_rows)
    pool_rows = padded_rows(a, pool_index(components, experts), experts, compute)
    for expert in experts:
        segments = expert.segments(max_rank, pool_rows)
        for block, x_rows in _row_blocks(x, expert.rows, compute, row_index):
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
    compute, experts = _compute_dtype(out), live_experts(ranks, u.shape[1], group_offsets, out.shape[0])
    index = pool_index(components, experts)
    pool_rows = padded_rows(b, index, experts, compute)
    gates = None if gate is None else padded_rows(gate, index, experts, gate.dtype)
    for expert in experts:
        segments, first = expert.segments(u.shape[1], pool_rows), expert.padded.start
        for block, total in _row_blocks(out, expert.rows, compute):
            for slots, rows_of_b in segments:
                own = slice(first + slots.start, first + slots.stop)
                total.addmm_(_gated(u[block, slots], gates, own, compute), rows_of_b, alpha=scaling)
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
    compute, experts = _compute_dtype(y), live_experts(ranks, u.shape[1], group_offsets, u.shape[0])
    index = pool_index(components, experts)
    sums = _RowSums(y.new_zeros(pool_size, y.shape[1], dtype=dtype), index, compute, scaling, gate)
    for expert in experts:
        for block, y_rows in _row_blocks(y, expert.rows, compute, row_index):
            sums.add(expert, block, u, y_rows)
    return sums.stored()


class _RowSums:
    """``d[comp(e, j)] = scaling * gate_j * sum_i u[i, j] y[i]`` for the live components, block by block of rows."""

    def __init__(
        self, d: Tensor, index: slice | Tensor, compute: torch.dtype, scaling: float, gate: Tensor | None
    ) -> None:
        """
        Args:
            d: ``[R, N]``, zero.
            index: Pool rows of the live components, expert by expert.
            compute: Dtype of the sums.
            scaling: A factor.
            gate: ``[R]``.
        """
        self.d, self.index, self.scaling = d, index, scaling
        self.gates = None if gate is None else gate[index]
        self.in_place = isinstance(index, slice) and d.dtype == compute
        live = index.stop if isinstance(index, slice) else len(index)
        self.sums = d[index] if self.in_place else d.new_empty(live, d.shape[1], dtype=compute)

    def add(self, expert: Expert, block: slice, u: Tensor, y_rows: Tensor) -> None:
        """Add an expert's block of rows; its first one overwrites what is there."""
        left = _gated(u[block, : expert.rank], self.gates, expert.live, self.sums.dtype)
        beta = 0 if block.start == expert.rows.start else 1
        self.sums[expert.live].addmm_(left.t(), y_rows, beta=beta, alpha=self.scaling)

    def stored(self) -> Tensor:
        """d."""
        if not self.in_place:
            self.d[self.index] = self.sums.to(self.d.dtype)
        return self.d


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
    compute, experts = _compute_dtype(dy), live_experts(ranks, u.shape[1], group_offsets, u.shape[0])
    index = pool_index(components, experts)
    pool_rows = padded_rows(b, index, experts, compute)
    sums = _RowSums(b.new_zeros(b.shape), index, compute, scaling, gate)
    v, c = dy.new_zeros(u.shape), torch.zeros(b.shape[0], dtype=_sum_dtype(dy), device=dy.device)
    for expert in experts:
        segments = expert.segments(u.shape[1], pool_rows)
        for block, dy_rows in _row_blocks(dy, expert.rows, compute, row_index):
            for slots, rows_of_b in segments:
                v[block, slots] = dy_rows @ rows_of_b.t()
            sums.add(expert, block, u, dy_rows)
    products = u.to(c.dtype) * v.to(c.dtype)
    sensitivities = [products[expert.rows, : expert.rank].sum(0) for expert in experts]
    if sensitivities:
        c[index] = scaling * torch.cat(sensitivities)
    return v, sums.stored(), c


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
    biases = [None] * len(matrices) if bias is None else bias.unbind()
    for (first, last), matrix, of_expert in zip(pairwise(offsets), matrices.unbind(), biases, strict=True):
        if last > first:
            _gemm(y[first:last], x, slice(first, last), matrix, of_expert, row_index)
    return y


def _gemm(y: Tensor, x: Tensor, rows: slice, matrix: Tensor, bias: Tensor | None, row_index: Tensor | None) -> None:
    """``y = x[rows] @ matrix + bias`` for ``matrix`` ``[K, N]``, widened by blocks of columns where that is faster."""
    compute = _compute_dtype(x)
    if compute == x.dtype or len(y) < _WIDENED_ROWS:
        x_rows = _rows(x, rows, row_index)
        torch.mm(x_rows, matrix, out=y) if bias is None else torch.addmm(bias, x_rows, matrix, out=y)
        return
    columns = max(_WEIGHT_ELEMENTS // max(matrix.shape[0], 1), 1)
    for low in range(0, matrix.shape[1], columns):
        part = slice(low, low + columns)
        wide, wide_bias = matrix[:, part].to(compute), None if bias is None else bias[part].to(compute)
        for block, x_rows in _row_blocks(x, rows, compute, row_index):
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
        chosen = rows.index_select(0, position).to(out.dtype)
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
