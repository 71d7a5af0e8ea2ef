"""Shares of a long expert's rows: deterministic sums over all of them, within one launch.

Each of the expert's programs writes fp32 partial sums, and the one that arrives last adds them up in the order of the
shares, so that the result does not depend on which that is.
"""

import triton
import triton.language as tl


@triton.jit
def locate_share(
    pid,
    group_offsets_ptr,  # [E + 1], unused unless GROUPED
    num_rows,
    num_experts,
    share_rows,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Share ``pid`` of all -> (expert, share, the expert's shares, slot of its first, first row, end of its rows).

    expert >= E if there is none. An expert of n rows has ``n // share_rows`` shares, and one if that is 0, each of
    whole blocks of BLOCK_M rows. Slots number those ``n // share_rows``.
    """
    expert, share, slot = pid * 0, pid, pid * 0
    start, stop = pid * 0, num_rows
    num_shares = tl.maximum(num_rows // share_rows, 1)
    if GROUPED:
        offs_e = tl.arange(0, BLOCK_E)
        starts = tl.load(group_offsets_ptr + offs_e, mask=offs_e < num_experts, other=0)
        ends = tl.load(group_offsets_ptr + offs_e + 1, mask=offs_e < num_experts, other=0)
        slots = (ends - starts) // share_rows
        shares = tl.where(offs_e < num_experts, tl.maximum(slots, 1), 0)
        expert = tl.sum((tl.cumsum(shares, 0) <= pid).to(tl.int32), 0)
        share = pid - tl.sum(tl.where(offs_e < expert, shares, 0), 0)
        slot = tl.sum(tl.where(offs_e < expert, slots, 0), 0)
        num_shares = tl.sum(tl.where(offs_e == expert, shares, 0), 0)
        owner = tl.minimum(expert, num_experts - 1)
        start, stop = tl.load(group_offsets_ptr + owner), tl.load(group_offsets_ptr + owner + 1)
    rows = tl.cdiv(tl.cdiv(stop - start, tl.maximum(num_shares, 1)), BLOCK_M) * BLOCK_M
    first = start + share * rows
    return expert, share, num_shares, slot, first, tl.minimum(first + rows, stop)


@triton.jit
def barrier_of_stores(IS_HIP: tl.constexpr):
    """A barrier of the program's threads, after which every store of theirs is where a release of any of them finds it.

    On AMD a barrier alone does not wait for stores that are on their way to the L2.
    """
    if IS_HIP:
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=s,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def sum_shares(
    value,
    partial_ptr,  # [slots, results, SIZE] fp32
    counters_ptr,  # [slots, results], zeros; that of an expert's first slot counts its programs that have arrived
    result,
    results,
    share,
    num_shares,
    SIZE: tl.constexpr,
    IS_HIP: tl.constexpr,
):
    """The sum of all shares' ``value``, a matrix of SIZE elements at most, and whether this program has it: the last.

    ``result`` numbers it among all of the expert's first slot and those before, of ``results`` each.
    """
    has_sum = num_shares == 1
    if num_shares > 1:
        offs = tl.arange(0, value.shape[0])[:, None] * value.shape[1] + tl.arange(0, value.shape[1])[None, :]
        partial = partial_ptr + result * SIZE + offs
        tl.store(partial + share.to(tl.int64) * results * SIZE, value)
        # The barrier puts the stores of all threads before the atomic, which one thread does. Its release, at the scope
        # of the GPU, covers what was before the barrier; each atomic on the counter continues the release sequence of
        # those before it, so the last one's acquire sees the stores of all, and the second barrier passes that on to
        # the threads that load.
        barrier_of_stores(IS_HIP)
        has_sum = tl.atomic_add(counters_ptr + result, 1, sem="acq_rel", scope="gpu") == num_shares - 1
        tl.debug_barrier()
        if has_sum:
            value = tl.zeros_like(value)
            for s in range(0, num_shares):
                value += tl.load(partial + tl.cast(s, tl.int64) * results * SIZE)
    return value, has_sum
