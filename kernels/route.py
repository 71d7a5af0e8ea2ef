"""route: the (token, choice) pairs of a batch sorted by expert, stably, in two launches and without a host sync.

A counting sort. Each program has a share of the pairs: it counts them by expert (``count``), then, from the counts of
all shares, knows where its own pairs of each expert begin (``scatter``). No atomics on global memory: equal runs give
equal orders. Pairs of no expert (an index outside ``0..E-1``) are sorted to the end, as those of an expert E.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs at a time, each compared with all before it.
_BLOCK = 64
# All shares' counts are read by every program: 128 x 512 experts are 256 KB, out of the L2.
_MOST_PROGRAMS = 128
# Counts read at a time, 32 a thread.
_TILE = 4096
_NUM_WARPS = 4


@triton.jit
def experts_of(experts_ptr, pairs, end, num_experts):
    """The expert of each pair, int32; ``num_experts`` for pairs of none and from ``end`` on."""
    expert = tl.load(experts_ptr + pairs, mask=pairs < end, other=num_experts)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "share"])
def count_kernel(
    experts_ptr,  # [L]
    counts_ptr,  # [programs, BLOCK_E], output
    num_pairs,
    share,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """How many of a program's ``share`` pairs go to each expert. Grid: (programs,)."""
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * share
    end = tl.minimum(first + share, num_pairs)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(first, end, BLOCK):
        counts += tl.histogram(experts_of(experts_ptr, start + tl.arange(0, BLOCK), end, num_experts), BLOCK_E)
    tl.store(counts_ptr + pid * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["num_pairs", "share"])
def scatter_kernel(
    experts_ptr,  # [L]
    counts_ptr,  # [programs, BLOCK_E]
    token_index_ptr,  # [L], output
    row_order_ptr,  # [L], output
    row_position_ptr,  # [L], output
    group_offsets_ptr,  # [E + 1], output
    num_pairs,
    share,
    num_experts,
    num_programs,
    top_k,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sorted rows of a program's ``share`` pairs. Grid: (programs,)."""
    pid = tl.program_id(0)
    offs_e, offs = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    total, before = tl.zeros((BLOCK_E,), dtype=tl.int32), tl.zeros((BLOCK_E,), dtype=tl.int32)
    for p in range(0, num_programs, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        counts = tl.load(
            counts_ptr + offs_p[:, None] * BLOCK_E + offs_e[None, :], mask=(offs_p < num_programs)[:, None], other=0
        )
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((offs_p < pid)[:, None], counts, 0), 0)
    group_offsets = tl.cumsum(total, 0) - total
    if pid == 0:
        tl.store(group_offsets_ptr + offs_e, group_offsets, mask=offs_e <= num_experts)

    next_row = group_offsets + before
    first = pid.to(tl.int64) * share
    end = tl.minimum(first + share, num_pairs)
    for start in range(first, end, BLOCK):
        pair = start + offs
        expert = experts_of(experts_ptr, pair, end, num_experts)
        is_earlier_of_expert = (expert[None, :] == expert[:, None]) & (offs[None, :] < offs[:, None])
        row = (tl.gather(next_row, expert, 0) + tl.sum(is_earlier_of_expert.to(tl.int32), 1)).to(tl.int64)
        next_row += tl.histogram(expert, BLOCK_E)
        mask = pair < end
        tl.store(row_order_ptr + row, pair, mask=mask)
        tl.store(token_index_ptr + row, pair // top_k, mask=mask)
        tl.store(row_position_ptr + pair, row, mask=mask)


@torch.library.custom_op("lrlora_triton::route", mutates_args=())
def route(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_index, row_order ``[L]``, row_position ``[T, k]`` (int64) and group_offsets int32 ``[E + 1]``.

    See ``Routing``, for top_k_index int32 or int64 ``[T, k]``.
    """
    experts, num_pairs = top_k_index.contiguous(), top_k_index.numel()
    token_index, row_order = (experts.new_empty(num_pairs, dtype=torch.int64) for _ in range(2))
    row_position = experts.new_empty(experts.shape, dtype=torch.int64)
    if num_pairs == 0:
        return token_index, row_order, row_position, experts.new_zeros(num_experts + 1, dtype=torch.int32)
    group_offsets = experts.new_empty(num_experts + 1, dtype=torch.int32)
    block_e = triton.next_power_of_2(num_experts + 1)
    blocks = triton.cdiv(num_pairs, _BLOCK)
    share = triton.cdiv(blocks, _MOST_PROGRAMS) * _BLOCK
    programs = triton.cdiv(num_pairs, share)
    counts = experts.new_empty(programs, block_e, dtype=torch.int32)
    options = {"BLOCK": _BLOCK, "BLOCK_E": block_e, "num_warps": _NUM_WARPS}
    count_kernel[(programs,)](experts, counts, num_pairs, share, num_experts, **options)
    scatter_kernel[(programs,)](
        experts,
        counts,
        token_index,
        row_order,
        row_position,
        group_offsets,
        num_pairs,
        share,
        num_experts,
        programs,
        experts.shape[1],
        BLOCK_P=max(1, _TILE // block_e),
        **options,
    )
    return token_index, row_order, row_position, group_offsets


@route.register_fake
def _(top_k_index, num_experts):
    token_index, row_order = (top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64) for _ in range(2))
    row_position = torch.empty(top_k_index.shape, dtype=torch.int64, device=top_k_index.device)
    return token_index, row_order, row_position, top_k_index.new_empty(num_experts + 1, dtype=torch.int32)
