"""Lower bounds, computed from shapes and never measured: bytes that must move, FLOPs that must be done, the time.

The machine is the H200 of KERNELS.md: the rates of a large device copy and of a large bf16 matrix product.
A floor takes the larger of the two times and so assumes that memory and arithmetic overlap perfectly.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import ExpertsShape, ProjectionShape, Shape
from lrlora_ops import plan

AnyShape = Shape | ExpertsShape | ProjectionShape


@dataclass(frozen=True)
class Machine:
    """Rates that a program can reach, in bytes and FLOP per second."""

    name: str
    bandwidth: float
    flops: float


H200 = Machine("H200", bandwidth=4.3e12, flops=790e12)


class Cost(plan.Cost):
    """Bytes moved to and from device memory, and useful floating-point operations."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor_ms(self, machine: Machine = H200) -> float:
        return self.milliseconds(machine)


def base_cost(shape: AnyShape, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """The frozen layer, see ``Layer.base_cost``."""
    cost = _layer(shape, itemsize).base_cost(backward)
    return Cost(cost.bytes, cost.flops)


def lora_cost(
    shape: AnyShape, rank: int, itemsize: int = 2, adapter_itemsize: int = 2, *, backward: bool = True
) -> Cost:
    """The adapters alone, ``rank`` components per expert and projection, see ``Layer.lora_cost``."""
    cost = _layer(shape, itemsize).lora_cost(rank, backward, adapter_itemsize)
    return Cost(cost.bytes, cost.flops)


def _layer(shape: AnyShape, itemsize: int) -> plan.Layer:
    """Rows outside of experts' projections are read and written once per token: they fit the cache."""
    if isinstance(shape, ExpertsShape):
        widths = ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden))
        return plan.Layer("", shape.num_experts, widths, shape.T, shape.rows, itemsize, 0)
    experts, rows = (1, shape.M) if isinstance(shape, Shape) else (shape.num_experts, shape.rows)
    return plan.Layer("", experts, ((shape.K, shape.N),), rows, rows, itemsize, 0)


def accumulating_cost(shape: Shape, rank: int, itemsize: int = 2) -> Cost:
    """The adapter if its expands write y and dx, and the base products add to them: these two writes on top."""
    cost = lora_cost(shape, rank, itemsize, itemsize)
    return Cost(cost.bytes + itemsize * shape.M * (shape.K + shape.N), cost.flops)


def sinc_passes_cost(shape: Shape, rank: int, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """SincUpdate's passes over the weight's elements, see ``Layer.sinc_passes_cost``."""
    cost = _layer(shape, itemsize).sinc_passes_cost(rank, backward)
    return Cost(cost.bytes, cost.flops)


def sinc_cost(shape: Shape, rank: int, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """SincUpdate beyond the frozen layer: its passes, and backward the product ``dy^T x``."""
    cost = sinc_passes_cost(shape, rank, itemsize, backward=backward)
    if not backward:
        return cost
    product = _layer(shape, itemsize).sinc_product_cost()
    return cost + Cost(product.bytes, product.flops)


def experts_passes_cost(layer: ExpertsShape, itemsize: int = 2, *, backward: bool = True) -> Cost:
    """What the frozen experts move besides their products: the activation and the combination, as passes of their own.

    Forward reads ``[gate, up]``, writes h, reads all rows and writes a sum per token. Backward reads ``[gate, up]`` and
    the gradient of h, writes that of ``[gate, up]``, and sums rows again.
    """
    combination = layer.rows * layer.hidden + layer.T * layer.hidden
    activation = layer.rows * layer.intermediate
    forward, both = 3 * activation + combination, 8 * activation + 2 * combination
    return Cost(itemsize * (both if backward else forward), 0)


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
    "sinc_weight_kernel": lambda arguments: 2 * arguments["out_ptr"].numel() * arguments["rank"],
    "sinc_gradients_kernel": lambda arguments: 6 * arguments["m_ptr"].numel() * arguments["WIDTH"],
    "dropout_kernel": lambda arguments: 2 * arguments["x_ptr"].numel(),
}
