"""What every kernel shares: from a program to its rows, from a rank slot to its pool row."""

import torch
import triton
import triton.language as tl


def padded_rank(max_rank: int) -> int:
    """Columns of a U or V buffer: a power of two from 16 to 128, then a multiple of 128.

    From the capacity, never from the current rank, so that no rank change recompiles.
    """
    return max(16, triton.next_power_of_2(max_rank)) if max_rank <= 128 else triton.cdiv(max_rank, 128) * 128


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied: "tf32" or "ieee", as torch multiplies on the GPU; other dtypes have one way.

    Follows ``torch.backends.cuda.matmul.fp32_precision`` and, as that does, ``torch.set_float32_matmul_precision``.
    """
    if dtype != torch.float32:
        return "ieee"
    # Younger than the oldest torch that is supported. Once it is set, reading the older setting raises.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if precision == "tf32" else "ieee"


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x itself if its columns are adjacent in memory, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """An upper bound on the row tiles, known without reading the group offsets."""
    return triton.cdiv(num_rows, block_m) + (num_experts - 1 if num_rows else 0)


@triton.jit
def expert_tiles(group_offsets_ptr, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tiles of each expert, int32 [BLOCK_E]; no expert past the last has any."""
    offs_e = tl.arange(0, BLOCK_E)
    start = tl.load(group_offsets_ptr + offs_e, mask=offs_e < num_experts, other=0)
    end = tl.load(group_offsets_ptr + offs_e + 1, mask=offs_e < num_experts, other=0)
    return (end - start + BLOCK_M - 1) // BLOCK_M


@triton.jit
def locate_tile(
    pid,
    group_offsets_ptr,  # [E + 1], unused unless GROUPED
    num_rows,
    num_experts,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Row tile ``pid`` -> (expert, first row, end of the expert's rows); first >= end if there is no such tile."""
    expert = pid * 0
    first = pid * BLOCK_M
    end = num_rows
    if GROUPED:
        tiles = expert_tiles(group_offsets_ptr, num_experts, BLOCK_M, BLOCK_E)
        last_tile = tl.cumsum(tiles, 0)
        found = tl.sum((last_tile <= pid).to(tl.int32), 0)
        expert = tl.minimum(found, num_experts - 1)
        tiles_before = tl.sum(tl.where(tl.arange(0, BLOCK_E) < expert, tiles, 0), 0)
        end = tl.load(group_offsets_ptr + expert + 1)
        first = tl.load(group_offsets_ptr + expert) + (pid - tiles_before) * BLOCK_M
    return expert, first, end


@triton.jit
def stores_end(expert, end, num_rows, num_experts):
    """The row up to which an expert's tiles write: the last expert's go on to the last row, which is no expert's."""
    return tl.where(expert == num_experts - 1, num_rows, end)


@triton.jit
def pool_rows(
    components_ptr,  # [E, max_rank], unused unless HAS_TABLE
    expert,
    offs_r,
    rank,
    max_rank,
    HAS_TABLE: tl.constexpr,
):
    """int64 pool rows of an expert's components ``offs_r``; a dense layer owns its pool in order."""
    rows = offs_r
    if HAS_TABLE:
        rows = tl.load(components_ptr + expert * max_rank + offs_r, mask=offs_r < rank, other=0)
    return rows.to(tl.int64)


@triton.jit
def source_rows(
    row_index_ptr,  # [L], unused unless HAS_INDEX
    offs_m,
    mask_m,
    HAS_INDEX: tl.constexpr,
):
    """int64 rows of the gathered operand that the sorted rows ``offs_m`` stand for."""
    rows = offs_m
    if HAS_INDEX:
        rows = tl.load(row_index_ptr + offs_m, mask=mask_m, other=0)
    return rows.to(tl.int64)
