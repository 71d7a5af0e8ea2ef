"""Lower bounds, computed from shapes and never measured: bytes that must move, FLOPs that must be done, the time.

The machine is the H200 of KERNELS.md: the rates of a large device copy and of a large bf16 matrix product.
A floor takes the larger of the two times and so assumes that memory and arithmetic overlap perfectly.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import ExpertsShape, Shape


@dataclass(frozen=True)
class Machine:
    """Rates that a program can reach, in bytes and FLOP per second."""

    name: str
    bandwidth: float
    flops: float


H200 = Machine("H200", bandwidth=4.3e12, flops=790e12)


@dataclass(frozen=True)
class Cost:
    """Bytes moved to and from device memory, and useful floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor_ms(self, machine: Machine = H200) -> float:
        return 1e3 * max(self.bytes / machine.bandwidth, self.flops / machine.flops)


def base_cost(shape: Shape, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """The frozen layer, forward and if asked for dx: each a product that reads two matrices and writes one."""
    m, k, n = shape.M, shape.K, shape.N
    products = 2 if backward else 1
    return Cost(products * itemsize * (m * k + k * n + m * n), products * 2 * m * k * n)


def lora_cost(shape: Shape, rank: int, itemsize: int = 2, adapter_itemsize: int = 2, *, backward: bool = True) -> Cost:
    """The adapter alone, forward and if asked for backward (dx, dA, dB, c), if every expand rides on a base product.

    x is read twice (U, dA) and dy once (V, dB, c); U and V are written once and read twice; A and B are read twice
    and their gradients written once. Six products of ``2 r`` FLOPs per element: U, dA, dx over K and y, V, dB over N.
    Forward alone reads x, A and B once, writes and reads U, and has the products U and y. Rank 0 costs nothing.
    """
    m, k, n = shape.M, shape.K, shape.N
    if rank == 0:
        return Cost(0, 0)
    if not backward:
        return Cost(itemsize * m * (k + 2 * rank) + adapter_itemsize * rank * (k + n), 2 * m * rank * (k + n))
    activations = itemsize * (2 * m * k + m * n + 6 * m * rank)
    return Cost(activations + 3 * adapter_itemsize * rank * (k + n), 6 * m * rank * (k + n))


def accumulating_cost(shape: Shape, rank: int, itemsize: int = 2) -> Cost:
    """The adapter if its expands write y and dx, and the base products add to them: these two writes on top."""
    cost = lora_cost(shape, rank, itemsize, itemsize)
    return Cost(cost.bytes + itemsize * shape.M * (shape.K + shape.N), cost.flops)


def experts_base_cost(layer: ExpertsShape, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """The frozen experts: each of two projections reads all weights once, x per token and its rows, writes its rows."""
    t, rows, k, n, e = layer.T, layer.rows, layer.hidden, layer.intermediate, layer.num_experts
    products = 2 if backward else 1
    weights, activations = e * 3 * k * n, t * k + rows * 3 * n + rows * k
    return Cost(products * itemsize * (weights + activations), products * 2 * rows * 3 * k * n)


def experts_passes_cost(layer: ExpertsShape, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """What the frozen experts move besides their products: the activation and the combination, as passes of their own.

    Forward reads ``[gate, up]``, writes h, reads all rows and writes a sum per token. Backward reads ``[gate, up]`` and
    the gradient of h, writes that of ``[gate, up]``, and sums rows again.
    """
    combination = layer.rows * layer.hidden + layer.T * layer.hidden
    activation = layer.rows * layer.intermediate
    forward, both = 3 * activation + combination, 8 * activation + 2 * combination
    return Cost(itemsize * (both if backward else forward), 0)


def experts_lora_cost(
    layer: ExpertsShape, rank: int, itemsize: int = 2, adapter_itemsize: int = 2, *, backward: bool = True
) -> Cost:
    """The adapters alone, ``rank`` components per expert in both projections, by the rules of ``lora_cost``.

    x and the gradient of the output are read once per token, not once per row: they fit the cache.
    """
    t, rows, k, n, e = layer.T, layer.rows, layer.hidden, layer.intermediate, layer.num_experts
    widths = (k + 2 * n) + (n + k)
    if rank == 0:
        return Cost(0, 0)
    if not backward:
        activations = itemsize * (t * k + rows * n + 4 * rows * rank)
        return Cost(activations + adapter_itemsize * e * rank * widths, 2 * rows * rank * widths)
    activations = itemsize * (2 * t * k + rows * 2 * n + 2 * rows * n + t * k + 12 * rows * rank)
    return Cost(activations + 3 * adapter_itemsize * e * rank * widths, 6 * rows * rank * widths)


def launch_cost(kernel: str, arguments: dict[str, Any]) -> Cost:
    """One launch of a Triton kernel, from the arguments it was given.

    Each tensor argument is moved once; a second read by another program is taken to hit the L2. Every component counts
    as live.
    """
    moved = sum(tensor.numel() * tensor.element_size() for tensor in arguments.values() if torch.is_tensor(tensor))
    return Cost(moved, _FLOPS[kernel](arguments))


def _product(arguments: dict[str, Any]) -> int:
    return 2 * arguments["num_rows"] * arguments["num_cols"] * arguments["WIDTH"]


def _gradients(arguments: dict[str, Any]) -> int:
    return 2 * arguments["u_ptr"].numel() * (arguments["in_features"] + arguments["out_features"])


_FLOPS = {
    "shrink_kernel": _product,
    "expand_kernel": _product,
    "gram_kernel": _product,
    "shrink_gram_kernel": lambda arguments: _product(arguments) * (2 if arguments["FUSE_GRAM"] else 1),
    "reduce_kernel": lambda arguments: arguments["partial_ptr"].numel(),
    "grouped_gemm_kernel": lambda arguments: (
        2 * arguments["num_rows"] * arguments["out_features"] * (arguments["in_features"] + arguments["WIDTH"])
    ),
    "gated_shrink_kernel": _product,
    "gated_shrink_backward_kernel": lambda arguments: 2 * _product(arguments),
    "adapter_gradients_kernel": _gradients,
    "count_kernel": lambda arguments: arguments["num_pairs"],
    "scatter_kernel": lambda arguments: arguments["num_pairs"],
    "combine_kernel": lambda arguments: 2 * arguments["positions_ptr"].numel() * arguments["num_cols"],
    "dropout_kernel": lambda arguments: 2 * arguments["x_ptr"].numel(),
}
