"""Random inputs for the primitives, what these must compute, and how far from that a backend may be.

Whatever a primitive must not read is NaN or an index out of range here: the pool rows and gates of dead components,
the table beyond a rank, the rows of no expert and the rows that no index names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

SCALING = 0.75
_UNREADABLE = 2**30


@dataclass(frozen=True)
class Case:
    """Sizes of one call: dense without ``group_sizes``; rows beyond their sum belong to no expert.

    Experts own pool rows from anywhere, or ``in_order``.
    """

    ranks: tuple[int, ...]
    max_rank: int
    rows: int
    in_features: int
    out_features: int
    group_sizes: tuple[int, ...] | None = None
    gather: bool = False
    in_order: bool = False


@dataclass
class Inputs:
    """Tensors of one call: x ``[M, K]``, u ``[L, width]``, dy and base ``[L, N]``, a ``[R, K]``, b ``[R, N]``."""

    x: Tensor
    u: Tensor
    dy: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor
    ranks: Tensor
    components: Tensor | None
    group_offsets: Tensor | None
    row_index: Tensor | None
    experts: list[tuple[slice, Tensor]]  # (rows, pool rows) of each expert

    def use_whole_numbers(self) -> None:
        """Make every sum exact, and so the same in any order."""
        for name in ("x", "u", "dy", "base", "a", "b"):
            values = getattr(self, name).double()
            typical = values.nan_to_num().abs().mean() + 1e-9
            setattr(self, name, (2 * values / typical).round().to(getattr(self, name).dtype))

    def table(self) -> dict[str, Any]:
        return {"components": self.components, "group_offsets": self.group_offsets}

    @property
    def num_owned(self) -> int:
        """Rows that belong to an expert; they come first."""
        return len(self.base) if self.group_offsets is None else int(self.group_offsets[-1])

    def x_rows(self, rows: slice) -> Tensor:
        return self.x[rows] if self.row_index is None else self.x[self.row_index[rows].long()]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    width: int,
    *,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Normal inputs whose products are of order one in every size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sizes = (case.rows,) if case.group_sizes is None else case.group_sizes
    ends = list(accumulate(sizes))
    live = sum(case.ranks)
    pool_size = case.max_rank if case.group_sizes is None else live + 3
    order = torch.arange(pool_size, device=device)
    if case.group_sizes is not None and not case.in_order:
        order = torch.randperm(pool_size, generator=generator, device=device)
    own = list(order[:live].split(list(case.ranks)))
    experts = [(slice(end - size, end), rows) for end, size, rows in zip(ends, sizes, own, strict=True)]

    components = torch.full((len(sizes), case.max_rank), _UNREADABLE, dtype=torch.int32, device=device)
    for expert, rows in enumerate(own):
        components[expert, : len(rows)] = rows.int()
    a, b, gate = (
        torch.full((pool_size, n), torch.nan, device=device) for n in (case.in_features, case.out_features, 1)
    )
    a[order[:live]] = normal(live, case.in_features) / max(case.in_features, 1) ** 0.5
    b[order[:live]] = normal(live, case.out_features) / max(case.max_rank, 1) ** 0.5
    gate[order[:live]] = 1 + 0.3 * normal(live, 1)
    gate[order[:live][-1:]] = 0  # a probe: it adds nothing, and reports its sensitivity

    row_index = None
    x = normal(case.rows, case.in_features)
    if case.gather:
        row_index = torch.randint(case.rows // 2 + 1, (case.rows,), generator=generator, device=device).int()
        unread = torch.ones(case.rows, dtype=torch.bool, device=device)
        unread[row_index[: ends[-1]].long()] = False
        x[unread] = torch.nan
        row_index[ends[-1] :] = _UNREADABLE
    else:
        x[ends[-1] :] = torch.nan
    dy, base = normal(case.rows, case.out_features), normal(case.rows, case.out_features)
    dy[ends[-1] :] = torch.nan
    u = torch.zeros(case.rows, width, device=device)
    for row_slice, rows in experts:
        u[row_slice, : len(rows)] = normal(row_slice.stop - row_slice.start, len(rows))
    return Inputs(
        *(t.to(dtype) for t in (x, u, dy, base)),
        *(t.to(adapter_dtype or dtype) for t in (a, b)),
        gate=gate.squeeze(1).to(torch.float64 if dtype == torch.float64 else torch.float32),
        ranks=torch.tensor(case.ranks, dtype=torch.int32, device=device),
        components=None if case.group_sizes is None else components,
        group_offsets=(
            None if case.group_sizes is None else torch.tensor([0, *ends], dtype=torch.int32, device=device)
        ),
        row_index=row_index,
        experts=experts,
    )


def _gates(inputs: Inputs, own: Tensor, gated: bool, dtype: torch.dtype) -> Tensor:
    return (inputs.gate[own] if gated else torch.ones_like(inputs.gate[own])).to(dtype)


def expected_shrink(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """``u[i, j] = <x[i], a[comp(e_i, j)]>``, 0 elsewhere, computed expert by expert in ``dtype``."""
    u = torch.zeros(inputs.u.shape, dtype=dtype, device=inputs.u.device)
    for rows, own in inputs.experts:
        u[rows, : len(own)] = torch.einsum("mk,rk->mr", inputs.x_rows(rows).to(dtype), inputs.a[own].to(dtype))
    return u


def expected_expand(inputs: Inputs, base: Tensor | None, gated: bool, dtype: torch.dtype) -> Tensor:
    """``base[i] + scaling sum_j gate_j u[i, j] b[comp(e_i, j)]``; the sum in ``dtype``, added in base's dtype or it.

    Rows of no expert are zero.
    """
    out = torch.zeros(inputs.base.shape, dtype=dtype, device=inputs.u.device)
    if base is not None:
        out = base.to(torch.promote_types(base.dtype, dtype), copy=True)
        out[inputs.num_owned :] = 0
    for rows, own in inputs.experts:
        u, b = inputs.u[rows, : len(own)].to(dtype), inputs.b[own].to(dtype)
        out[rows] += SCALING * torch.einsum("mr,r,rn->mn", u, _gates(inputs, own, gated, dtype), b)
    return out


def _expected_gram(
    inputs: Inputs, y_rows: Callable[[slice], Tensor], pool: Tensor, gated: bool, dtype: torch.dtype
) -> Tensor:
    d = torch.zeros(pool.shape, dtype=dtype, device=pool.device)
    for rows, own in inputs.experts:
        product = torch.einsum("mr,mk->rk", inputs.u[rows, : len(own)].to(dtype), y_rows(rows).to(dtype))
        d[own] = SCALING * _gates(inputs, own, gated, dtype)[:, None] * product
    return d


def expected_gram(inputs: Inputs, gated: bool, dtype: torch.dtype) -> Tensor:
    """``d[comp(e, j)] = scaling gate_j sum_{i in e} u[i, j] x[i]``, 0 where a component is dead."""
    return _expected_gram(inputs, inputs.x_rows, inputs.a, gated, dtype)


def expected_shrink_gram(inputs: Inputs, gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``v = dy b^T``, the gram of u and dy, and ``c[comp(e, j)] = scaling sum_{i in e} u[i, j] v[i, j]``, ungated."""
    v = torch.zeros(inputs.u.shape, dtype=dtype, device=inputs.u.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    c = torch.zeros(inputs.b.shape[0], dtype=sum_dtype, device=inputs.u.device)
    for rows, own in inputs.experts:
        v[rows, : len(own)] = torch.einsum("mn,rn->mr", inputs.dy[rows].to(dtype), inputs.b[own].to(dtype))
        c[own] = SCALING * (inputs.u[rows, : len(own)].to(sum_dtype) * v[rows, : len(own)].to(sum_dtype)).sum(0)
    return v, _expected_gram(inputs, lambda rows: inputs.dy[rows], inputs.b, gated, dtype), c


def sensitivity_terms(inputs: Inputs) -> Tensor:
    """``scaling sum_{i in e} |u[i, j] v[i, j]|`` in fp64: with this scale the rounding errors of c, not with c."""
    terms = torch.zeros(inputs.b.shape[0], dtype=torch.float64, device=inputs.b.device)
    v = expected_shrink_gram(inputs, False, torch.float64)[0]
    for rows, own in inputs.experts:
        terms[own] = SCALING * (inputs.u[rows, : len(own)].double() * v[rows, : len(own)]).abs().sum(0)
    return terms


def assert_within_budget(actual: Tensor, exact: Tensor, plain: Tensor, terms: Tensor | None = None) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one rounding of the largest value.

    Args:
        actual: What the backend computed.
        exact: The same in fp64.
        plain: The same by plain PyTorch in the inputs' dtype.
        terms: For few sums whose terms may cancel: the sums of the terms' magnitudes, one rounding of which is allowed.
    """
    assert actual.shape == exact.shape == plain.shape
    if actual.numel() == 0:
        return
    plain_error = (plain.to(actual.dtype).double() - exact).abs().max()
    largest = (exact if terms is None else terms).abs().max()
    budget = 2 * plain_error + torch.finfo(actual.dtype).eps * largest
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"error {error:.3g} is above {budget:.3g}, with {plain_error:.3g} for plain PyTorch"


def assert_parity(
    actual: Tensor, expected: Callable[[torch.dtype], Tensor], dtype: torch.dtype, terms: Tensor | None = None
) -> None:
    """``assert_within_budget`` for an oracle that computes in a given dtype; in fp64 only the order of sums differs."""
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected(dtype), rtol=0, atol=1e-13)
        return
    assert_within_budget(actual, expected(torch.float64), expected(dtype), terms)


def bits(tensors: Tensor | tuple[Tensor, ...]) -> Iterator[bytes]:
    """The memory of each tensor: what two equal runs have in common."""
    for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
        yield tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
