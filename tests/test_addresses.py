"""Addresses past 2^31 elements, without the memory: rows far out in a sparse file that is touched nowhere else.

The kernels run interpreted, where int32 arithmetic wraps as it does on a GPU. Whole numbers make the sums exact.
"""

from __future__ import annotations

import importlib
import mmap
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from torch import Tensor

shrink_module, expand_module, gram_module, shrink_gram_module, reduce_module, dropout_module = (
    importlib.import_module(f"lrlora_ops.kernels.{name}")
    for name in ("shrink", "expand", "gram", "shrink_gram", "_reduce", "dropout")
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mapping is host memory, for the interpreter")

FAR = 2**27 + 5  # a row of 16 elements from here on is past 2^31
ROWS, COLUMNS, RANK, WIDTH = 4, 24, 3, 16
BLOCKS: dict[str, Any] = {"BLOCK_E": 1, "BLOCK_M": 16, "BLOCK_R": 16, "num_warps": 4}


def far(values: Tensor, first: int = FAR, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """(what the kernel takes for the start of the tensor, a view of its rows ``first`` and following)."""
    rows, columns = values.shape
    stride = columns if stride is None else stride
    end = (first + rows - 1) * stride + columns
    with TemporaryFile() as sparse:
        sparse.truncate(end * values.itemsize)
        memory = mmap.mmap(sparse.fileno(), 0)
    start = torch.frombuffer(memory, dtype=values.dtype, count=columns)
    whole = torch.frombuffer(memory, dtype=values.dtype, count=end)
    view = whole.as_strided((rows, columns), (stride, 1), first * stride)
    view.copy_(values)
    return start, view


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def far_u() -> tuple[Tensor, Tensor]:
    u = whole_numbers(ROWS, WIDTH)
    u[:, RANK:] = 0
    return far(u)


def table() -> dict[str, Any]:
    """One expert that owns the far rows and the far pool rows, out of order."""
    return {
        "ranks_ptr": torch.tensor([RANK], dtype=torch.int32),
        "components_ptr": torch.tensor([[FAR + 2, FAR, FAR + 1]], dtype=torch.int32),
        "group_offsets_ptr": torch.tensor([FAR, FAR + ROWS], dtype=torch.int32),
        "max_rank": RANK,
        "WIDTH": WIDTH,
        "HAS_TABLE": True,
        "GROUPED": True,
    }


def owned(pool: Tensor) -> Tensor:
    return pool[[2, 0, 1]].float()


SIZES = {"num_rows": FAR + ROWS, "num_cols": COLUMNS}


@pytest.mark.parametrize("gather", [False, True])
def test_shrink(gather):
    (x, x_rows), (a, a_rows) = far(whole_numbers(ROWS, COLUMNS)), far(whole_numbers(RANK, COLUMNS))
    u, u_rows = far(torch.full((ROWS, WIDTH), torch.nan, dtype=torch.float16))
    index, _ = far(torch.arange(FAR, FAR + ROWS, dtype=torch.int32)[:, None])
    shrink_module.shrink_kernel[(1, 1)](
        x_ptr=x, a_ptr=a, u_ptr=u, row_index_ptr=index, num_experts=1, stride_xm=COLUMNS, HAS_INDEX=gather,
        PRECISION="ieee", BLOCK_K=16, **SIZES, **table(), **BLOCKS,
    )  # fmt: skip
    assert torch.equal(u_rows[:, :RANK].float(), x_rows.float() @ owned(a_rows).t())
    assert not u_rows[:, RANK:].any()


def test_expand():
    (u, u_rows), (b, b_rows) = far_u(), far(whole_numbers(RANK, COLUMNS))
    (base, base_rows), (out, out_rows) = (far(whole_numbers(ROWS, COLUMNS)) for _ in range(2))
    expected = base_rows.float() + 2 * u_rows[:, :RANK].float() @ owned(b_rows)
    expand_module.expand_kernel[(1, 2)](
        u_ptr=u, b_ptr=b, gate_ptr=None, base_ptr=base, out_ptr=out, num_experts=1, stride_bm=COLUMNS, scaling=2.0,
        HAS_GATE=False, HAS_BASE=True, PRECISION="ieee", BLOCK_N=16, **SIZES, **table(), **BLOCKS,
    )  # fmt: skip
    assert torch.equal(out_rows.float(), expected)


@pytest.mark.parametrize("shares", [1, 2])
def test_gram(shares):
    (u, u_rows), (y, y_rows) = far_u(), far(whole_numbers(ROWS, COLUMNS))
    d, d_rows = far(torch.full((RANK, COLUMNS), torch.nan, dtype=torch.float16))
    partial, counters = torch.full((shares, 2, 16 * 16), torch.nan), torch.zeros(shares, 2, dtype=torch.int32)
    gram_module.gram_kernel[(2 * shares,)](
        u_ptr=u, y_ptr=y, d_ptr=d, partial_ptr=partial, counters_ptr=counters, gate_ptr=None, row_index_ptr=None,
        num_experts=1, share_rows=ROWS // shares, stride_ym=COLUMNS, scaling=2.0, HAS_GATE=False, HAS_INDEX=False,
        PRECISION="ieee", IS_HIP=False, BLOCK_N=16, **SIZES, **table(), **BLOCKS,
    )  # fmt: skip
    assert torch.equal(owned(d_rows), 2 * u_rows[:, :RANK].float().t() @ y_rows.float())
    assert counters.sum() == (2 * shares if shares > 1 else 0)


def test_shrink_gram():
    (dy, dy_rows), (b, b_rows) = far(whole_numbers(ROWS, COLUMNS)), far(whole_numbers(RANK, COLUMNS))
    (u, u_rows), (v, v_rows) = far_u(), far(torch.full((ROWS, WIDTH), torch.nan, dtype=torch.float16))
    partial, c = torch.full((1, WIDTH, COLUMNS), torch.nan), torch.full((1, WIDTH), torch.nan)
    shrink_gram_module.shrink_gram_kernel[(1, 1)](
        dy_ptr=dy, b_ptr=b, u_ptr=u, v_ptr=v, d_b_ptr=partial, c_ptr=c, row_index_ptr=None, num_experts=1,
        stride_dym=COLUMNS, FUSE_GRAM=True, HAS_INDEX=False, PRECISION="ieee", BLOCK_N=16,
        **SIZES, **table(), **BLOCKS,
    )  # fmt: skip
    expected = dy_rows.float() @ owned(b_rows).t()
    assert torch.equal(v_rows[:, :RANK].float(), expected)
    assert torch.equal(partial[0, :RANK], u_rows[:, :RANK].float().t() @ dy_rows.float())
    assert torch.equal(c[0, :RANK], (u_rows[:, :RANK].float() * expected).sum(0))


def test_reduce():
    """Expert 1's slabs, one for each row, come after those of expert 0's rows; expert 0 has rank 0."""
    slabs = FAR // 16
    partial, partial_rows = far(whole_numbers(2, WIDTH * COLUMNS, dtype=torch.float32), first=slabs)
    d, d_rows = far(torch.full((RANK, COLUMNS), torch.nan, dtype=torch.float16))
    arguments = table() | {
        "ranks_ptr": torch.tensor([0, RANK], dtype=torch.int32),
        "components_ptr": table()["components_ptr"].expand(2, -1).contiguous(),
        "group_offsets_ptr": torch.tensor([0, slabs, slabs + 2], dtype=torch.int32),
    }
    reduce_module.reduce_kernel[(2 * WIDTH, 2)](
        partial_ptr=partial, d_ptr=d, gate_ptr=None, num_slabs=slabs + 2, num_cols=COLUMNS, num_experts=2,
        scaling=2.0, HAS_GATE=False, BLOCK_E=2, BLOCK_M=1, BLOCK_N=16, BLOCK_S=4, **arguments,
    )  # fmt: skip
    assert torch.equal(owned(d_rows), 2 * partial_rows.sum(0).view(WIDTH, COLUMNS)[:RANK])


def test_dropout():
    stride = 2**30
    (x, x_rows), (out, out_rows) = (far(whole_numbers(ROWS, 32), 0, stride) for _ in range(2))
    out_rows.fill_(torch.nan)
    dropout_module.dropout_kernel[(1, 1)](
        x_ptr=x, out_ptr=out, seed_ptr=torch.tensor(1), num_rows=ROWS, num_cols=stride, stride_xm=stride, p=0.0,
        BLOCK_M=4, BLOCK_K=32,
    )  # fmt: skip
    assert torch.equal(out_rows, x_rows)
