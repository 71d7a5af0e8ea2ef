"""gated: ``h = act(gate) * up`` for rows ``[gate, up]``, with the low-rank products of its result in the same pass.

Forward writes h and the next projection's ``u = shrink(h, a)``. Backward takes the gradient of h before it is weighted
by the routing weights, recomputes h, and writes the gradient of ``[gate, up]``, the previous projection's v of that,
and the gradients of the routing weights, ``<h, dh>``: h goes into a product whose result is weighted. Memory-bound:
each value is read once and written once, and neither h nor the gradient is read again for its low-rank product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrlora_ops.kernels._configs import tile_for
from lrlora_ops.kernels._tiles import dot_precision, locate_tile, padded_rank, pool_rows, row_tiles, stores_end


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """``gate * sigmoid(z)`` and its derivative, in fp32: "silu" with ``z = gate``, or "gelu_tanh"."""
    z, slope = gate, 1.0
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(z / 2)) / 2 = sigmoid(z), and sqrt(8 / pi) = 1.595...
        z = 1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)
        slope = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    else:
        tl.static_assert(ACTIVATION == "silu")
    small = tl.exp(-tl.abs(z))
    larger = 1 / (1 + small)
    smaller = small * larger  # not 1 - larger, which cancels
    sigmoid, complement = tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger)
    value = gate * sigmoid
    return value, sigmoid + value * complement * slope


@triton.jit(do_not_specialize=["num_rows"])
def gated_shrink_kernel(
    gate_up_ptr,  # [L, 2 I]
    a_ptr,  # [R, I]
    h_ptr,  # [L, I], output
    u_ptr,  # [L, WIDTH], output; zero beyond an expert's rank
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of one expert by BLOCK_R rank slots; the first slots' program writes h. Grid: (row, rank tiles)."""
    expert, first, end = locate_tile(tl.program_id(0), group_offsets_ptr, num_rows, num_experts, True, BLOCK_M, BLOCK_E)
    last = stores_end(expert, end, num_rows, num_experts)
    if first >= last:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m, mask_stores = offs_m < end, offs_m < last
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(ranks_ptr + expert)
    mask_r = offs_r < rank
    offs_k = tl.arange(0, BLOCK_K)
    mask_h = mask_stores & (tl.program_id(1) == 0)

    rows = offs_m.to(tl.int64) * num_cols
    a_rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, True) * num_cols
    u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, num_cols, BLOCK_K):
        cols = k + offs_k
        mask_k = (cols < num_cols)[None, :]
        gate_up = gate_up_ptr + 2 * rows[:, None] + cols[None, :]
        gate = tl.load(gate_up, mask=mask_m[:, None] & mask_k, other=0.0).to(tl.float32)
        up = tl.load(gate_up + num_cols, mask=mask_m[:, None] & mask_k, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + a_rows[:, None] + cols[None, :], mask=mask_r[:, None] & mask_k, other=0.0)
        h = (activate(gate, ACTIVATION)[0] * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] + cols[None, :], h, mask=mask_h[:, None] & mask_k)
        u = tl.dot(h, tl.trans(a.to(h.dtype)), u, input_precision=PRECISION)

    slots = offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
    tl.store(u_ptr + slots, u.to(u_ptr.dtype.element_ty), mask=mask_stores[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def gated_shrink_backward_kernel(
    dh_ptr,  # [L, I]
    gate_up_ptr,  # [L, 2 I]
    b_ptr,  # [R, 2 I]
    weights_ptr,  # [T, k]
    row_order_ptr,  # [L]
    d_gate_up_ptr,  # [L, 2 I], output
    h_ptr,  # [L, I], output
    v_ptr,  # [L, WIDTH], output; zero beyond an expert's rank
    d_weights_ptr,  # [T, k], output
    ranks_ptr,  # [E]
    components_ptr,  # [E, max_rank]
    group_offsets_ptr,  # [E + 1]
    num_rows,
    num_cols,
    num_experts,
    max_rank,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of one expert by BLOCK_R rank slots; the first slots' program writes all but v.

    Grid: (row tiles, rank tiles).
    """
    expert, first, end = locate_tile(tl.program_id(0), group_offsets_ptr, num_rows, num_experts, True, BLOCK_M, BLOCK_E)
    last = stores_end(expert, end, num_rows, num_experts)
    if first >= last:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m, mask_stores = offs_m < end, offs_m < last
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(ranks_ptr + expert)
    mask_r = offs_r < rank
    offs_k = tl.arange(0, BLOCK_K)
    mask_first = mask_stores & (tl.program_id(1) == 0)

    pairs = tl.load(row_order_ptr + offs_m, mask=mask_stores, other=0).to(tl.int64)
    weights = tl.load(weights_ptr + pairs, mask=mask_m, other=0.0).to(tl.float32)
    rows = offs_m.to(tl.int64) * num_cols
    b_rows = pool_rows(components_ptr, expert, offs_r, rank, max_rank, True) * 2 * num_cols
    v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    d_weights = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(0, num_cols, BLOCK_K):
        cols = k + offs_k
        mask_k = (cols < num_cols)[None, :]
        mask, mask_out, mask_b = mask_m[:, None] & mask_k, mask_first[:, None] & mask_k, mask_r[:, None] & mask_k
        offs = rows[:, None] + cols[None, :]
        offs_gate = 2 * rows[:, None] + cols[None, :]
        dh = tl.load(dh_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + offs_gate + num_cols, mask=mask, other=0.0).to(tl.float32)
        b_gate = tl.load(b_ptr + b_rows[:, None] + cols[None, :], mask=mask_b, other=0.0)
        b_up = tl.load(b_ptr + b_rows[:, None] + cols[None, :] + num_cols, mask=mask_b, other=0.0)

        value, slope = activate(gate, ACTIVATION)
        d_weights += tl.sum(value * up * dh, 1)
        tl.store(h_ptr + offs, (value * up).to(h_ptr.dtype.element_ty), mask=mask_out)
        dh *= weights[:, None]
        d_gate = (dh * up * slope).to(d_gate_up_ptr.dtype.element_ty)
        d_up = (dh * value).to(d_gate_up_ptr.dtype.element_ty)
        tl.store(d_gate_up_ptr + offs_gate, d_gate, mask=mask_out)
        tl.store(d_gate_up_ptr + offs_gate + num_cols, d_up, mask=mask_out)
        v = tl.dot(d_gate, tl.trans(b_gate.to(d_gate.dtype)), v, input_precision=PRECISION)
        v = tl.dot(d_up, tl.trans(b_up.to(d_up.dtype)), v, input_precision=PRECISION)

    slots = offs_m.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
    tl.store(v_ptr + slots, v.to(v_ptr.dtype.element_ty), mask=mask_stores[:, None])
    tl.store(d_weights_ptr + pairs, d_weights.to(d_weights_ptr.dtype.element_ty), mask=mask_first)


@torch.library.custom_op("lrlora_triton::gated_shrink", mutates_args=())
def gated_shrink(
    gate_up: Tensor,
    a: Tensor,
    activation: str,
    ranks: Tensor,
    components: Tensor,
    group_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """h ``[L, I]`` and u ``[L, WIDTH]`` in gate_up's dtype, for gate_up ``[L, 2 I]`` and a ``[R, I]``.

    ``activation`` is "silu" or "gelu_tanh". Rows of no expert are zero.
    """
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    h = gate_up.new_empty(num_rows, num_cols)
    u = gate_up.new_empty(num_rows, padded_rank(components.shape[1]))
    if num_rows:
        _launch(
            gated_shrink_kernel,
            "gated_shrink",
            activation,
            (gate_up.contiguous(), a.contiguous(), h, u, ranks, components, group_offsets),
            u,
            num_cols,
        )
    return h, u


@gated_shrink.register_fake
def _(gate_up, a, activation, ranks, components, group_offsets):
    num_rows = gate_up.shape[0]
    return gate_up.new_empty(num_rows, a.shape[1]), gate_up.new_empty(num_rows, padded_rank(components.shape[1]))


@torch.library.custom_op("lrlora_triton::gated_shrink_backward", mutates_args=())
def gated_shrink_backward(
    dh: Tensor,
    gate_up: Tensor,
    b: Tensor,
    weights: Tensor,
    row_order: Tensor,
    activation: str,
    ranks: Tensor,
    components: Tensor,
    group_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_gate_up ``[L, 2 I]``, h ``[L, I]``, v ``[L, WIDTH]`` of d_gate_up and b ``[R, 2 I]``, and d_weights ``[T, k]``.

    dh ``[L, I]`` is the gradient of h before the routing weights ``[T, k]``, of which ``row_order`` ``[L]`` names each
    row's; d_gate_up and v are weighted, and h is not. Rows of no expert are zero, also in d_weights.
    """
    num_rows, num_cols = dh.shape
    d_gate_up, h = gate_up.new_empty(gate_up.shape), gate_up.new_empty(num_rows, num_cols)
    v = gate_up.new_empty(num_rows, padded_rank(components.shape[1]))
    d_weights = weights.new_empty(weights.shape)
    if num_rows:
        tensors = (dh.contiguous(), gate_up.contiguous(), b.contiguous(), weights.contiguous(), row_order)
        _launch(
            gated_shrink_backward_kernel,
            "gated_shrink_backward",
            activation,
            (*tensors, d_gate_up, h, v, d_weights, ranks, components, group_offsets),
            v,
            num_cols,
        )
    return d_gate_up, h, v, d_weights


@gated_shrink_backward.register_fake
def _(dh, gate_up, b, weights, row_order, activation, ranks, components, group_offsets):
    v = gate_up.new_empty(dh.shape[0], padded_rank(components.shape[1]))
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dh.shape), v, weights.new_empty(weights.shape)


def _launch(kernel, name: str, activation: str, tensors: tuple[Tensor, ...], u: Tensor, num_cols: int) -> None:
    """One launch of either kernel; ``tensors`` end in ranks ``[E]``, components ``[E, max_rank]`` and the offsets."""
    (num_rows, width), (num_experts, max_rank) = u.shape, tensors[-2].shape
    tile = tile_for(name, width, u.dtype, num_rows // num_experts, num_cols)
    kernel[row_tiles(num_rows, num_experts, tile.block_m), width // tile.block_r](
        *tensors,
        num_rows,
        num_cols,
        num_experts,
        max_rank,
        ACTIVATION=activation,
        WIDTH=width,
        PRECISION=dot_precision(u.dtype),
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_n,
        BLOCK_R=tile.block_r,
        **tile.launch_options(),
    )
