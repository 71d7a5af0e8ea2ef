"""sinc_gemm: ``y[i] = (W[e_i] + scaling * phi(b_e^T a_e)) x[row_index[i]] + bias[e_i]``, and its backward pass.

Compositions: ``sinc_weight`` makes the weights of all experts that have rows in one buffer of the frozen weights' size,
and the base product reads it. Backward, ``m = dy^T x`` of each expert is made in such a buffer by ``gram``, contracted
there, and replaced by the weight that dx is multiplied with.

Weights ``[E, K, N]`` are moved as they lie: ``phi(b^T a)^T = phi(a^T b)``, so a and b change places.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrlora_ops.kernels._tiles import padded_rank
from lrlora_ops.kernels.gram import launch_gram
from lrlora_ops.kernels.grouped_gemm import launch_gemm
from lrlora_ops.kernels.sinc import sinc_gradients, sinc_weight


@torch.library.custom_op("lrlora_triton::sinc_gemm", mutates_args=())
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
    """y ``[L, N]`` in x's dtype, for x ``[M, K]``, bias ``[E, N]`` and weight ``[E, N, K]`` (``[E, K, N]`` transposed).

    a is ``[E * R, K]``, b ``[E * R, N]``, c ``[2n + 1]`` fp32. ``dtype`` is what is multiplied in: x's.
    ``group_offsets`` int32 ``[E + 1]`` says which rows are whose; without it E is 1. ``row_index`` ``[L]`` gathers
    rows of x; without it L is M. Rows that belong to no expert are zero.
    """
    low_rank = (b, a) if transposed else (a, b)
    moved = sinc_weight(weight, *low_rank, c, grid, scaling, dtype, group_offsets)
    return _product(x, moved, bias, transposed, group_offsets, row_index)


@sinc_gemm.register_fake
def _(x, weight, bias, transposed, group_offsets, row_index, a, b, c, grid, scaling, dtype):
    return x.new_empty(x.shape[0] if row_index is None else row_index.shape[0], b.shape[1])


@torch.library.custom_op("lrlora_triton::sinc_gemm_backward", mutates_args=())
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
    """d_rows ``[L, K]`` in x's dtype, and d_a, d_b, d_c in fp32; what is not needed has no elements.

    ``dy_index`` and ``x_index`` gather rows of dy and of x. ``row_weights`` ``[L]`` are factors of the sorted rows in
    the gradients of a, b and c, but not in d_rows.
    """
    low_rank = (b, a) if transposed else (a, b)
    grads = [t.new_empty(0, dtype=torch.float32) for t in (a, b, c)]
    if needs_low_rank:
        moved = _outer(dy, x, transposed, group_offsets, dy_index, x_index, row_weights)
        frozen = weight if needs_rows else None
        grads = [*sinc_gradients(moved, frozen, *low_rank, c, grid, scaling, group_offsets)]
        grads[:2] = reversed(grads[:2]) if transposed else grads[:2]
    elif needs_rows:
        moved = sinc_weight(weight, *low_rank, c, grid, scaling, dtype, group_offsets)
    d_rows = _product(dy, moved, None, not transposed, group_offsets, dy_index) if needs_rows else x.new_empty(0)
    return d_rows, *grads


@sinc_gemm_backward.register_fake
def _(
    dy, x, weight, transposed, group_offsets, dy_index, x_index, row_weights, a, b, c, grid, scaling, dtype,
    needs_rows, needs_low_rank,
):  # fmt: skip
    num_rows = x.shape[0] if x_index is None else x_index.shape[0]
    d_rows = x.new_empty((num_rows, x.shape[1]) if needs_rows else 0)
    return d_rows, *(t.new_empty(t.shape if needs_low_rank else 0, dtype=torch.float32) for t in (a, b, c))


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    group_offsets: Tensor | None,
    row_index: Tensor | None,
) -> Tensor:
    """The base product of a weight that is its own: that of a dense layer is PyTorch's, as it is of a frozen one."""
    if group_offsets is not None:
        return launch_gemm(x, weight, bias, transposed, group_offsets, row_index)
    y = x @ (weight[0] if transposed else weight[0].t())
    return y if bias is None else y.add_(bias[0])


def _outer(
    dy: Tensor,
    x: Tensor,
    transposed: bool,
    group_offsets: Tensor | None,
    dy_index: Tensor | None,
    x_index: Tensor | None,
    row_weights: Tensor | None,
) -> Tensor:
    """``m[e] = sum over the rows i of e of w_i dy_i x_i^T``, ``[E, N, K]``, or ``[E, K, N]`` if transposed.

    An expert's rows of m are the rows of a pool, all of them live: ``gram`` with the rank N.
    """
    (left, left_index), (right, right_index) = ((x, x_index), (dy, dy_index))[:: 1 if transposed else -1]
    left = left if left_index is None else left[left_index]
    if row_weights is not None:
        left = (left * row_weights[:, None]).to(left.dtype)
    if group_offsets is None:
        return (left.t() @ right)[None]
    num_experts, size = group_offsets.shape[0] - 1, left.shape[1]
    components = torch.arange(num_experts * size, dtype=torch.int32, device=left.device).view(num_experts, size)
    ranks = torch.full((num_experts,), size, dtype=torch.int32, device=left.device)
    left = pad(left, (0, padded_rank(size) - size))
    owners = (components, group_offsets, right_index)
    m = launch_gram(left, right, ranks, num_experts * size, 1.0, right.dtype, None, *owners)
    return m.view(num_experts, size, right.shape[1])
