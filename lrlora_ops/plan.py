"""What adapters of a model will cost, by arithmetic on its layers: memory in a training step, and floors of time.

Nothing here is measured. Bytes are those of fp32 adapters trained by AdamW: A and B, as much again for gradients, twice
as much for the moments; and what autograd keeps for backward because of the adapters: ``u = x A^T`` and the layers'
inputs, which a frozen layer alone does not need. A SincUpdate keeps no u, but needs a buffer of a weight's size, which
one layer after another uses. Times are lower bounds: bytes that must move, or FLOPs that must be done, at the rates of
a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

ADAPTER = 4  # bytes of an fp32 element
COEFFICIENTS = 9  # SincUpdate's default, of each projection


@dataclass(frozen=True)
class Gpu:
    """Rates in bytes and bf16 FLOP per second, of the maker's datasheet without sparsity."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Cost:
    """Bytes moved to and from device memory, and floating-point operations."""

    bytes: float
    flops: float

    def milliseconds(self, gpu: Gpu) -> float:
        """If memory and arithmetic overlap perfectly."""
        return 1e3 * max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)


@dataclass(frozen=True)
class Layer:
    """A linear layer, or the experts of a layer.

    Attributes:
        name: In the model.
        num_experts: 1 for a linear layer.
        projections: Inputs K and outputs N of each: one, or those of gate_up_proj and down_proj.
        tokens: Rows of the layer's input in a step.
        rows: Rows that the products work on: tokens, or tokens times top_k.
        itemsize: Bytes of an element of the model.
        source: Which tensor the layer reads; layers with the same source share their input.
    """

    name: str
    num_experts: int
    projections: tuple[tuple[int, int], ...]
    tokens: int
    rows: int
    itemsize: int
    source: int

    @property
    def is_experts(self) -> bool:
        """Whether it has more projections than one, through which rows are routed."""
        return len(self.projections) > 1

    def parameters(self, rank: float) -> float:
        """Of A and B, at this mean rank of an expert."""
        return self.num_experts * rank * sum(k + n for k, n in self.projections)

    def u_bytes(self, width: float) -> float:
        """Of the rows' ``u`` in all projections, ``width`` columns each, in the model's dtype."""
        return self.rows * width * len(self.projections) * self.itemsize

    def base_cost(self, backward: bool = True) -> Cost:
        """The frozen products, forward and if asked for dx: each reads weights and rows, and writes rows."""
        products, sizes = 2 if backward else 1, sum(k * n for k, n in self.projections)
        moved = self.num_experts * sizes + sum(inputs * k + self.rows * n for inputs, _, k, n in self._passes())
        return Cost(products * self.itemsize * moved, products * 2 * self.rows * sizes)

    def lora_cost(self, rank: float, backward: bool = True, adapter_itemsize: int = ADAPTER) -> Cost:
        """The adapters alone, forward and if asked for backward (dx, dA, dB, c), if every expand rides on a base
        product.

        x is read for U and for dA, dy once (V, dB, c), U and V written once and read twice; A and B are read twice,
        their gradients written once. Six products of ``2 r`` FLOPs per element: U, dA, dx over K and y, V, dB over N.
        Forward alone reads x, A and B once, writes and reads U, and has the products U and y. Rank 0 costs nothing.
        """
        if rank == 0:
            return Cost(0, 0)
        uses = 3 if backward else 1  # of A and B, and pairs of products
        moved = uses * 2 * self.rows * rank * len(self.projections)
        for inputs, outputs, k, n in self._passes():
            moved += 2 * inputs * k + outputs * n if backward else inputs * k
        flops = uses * 2 * self.rows * rank * sum(k + n for k, n in self.projections)
        return Cost(self.itemsize * moved + uses * adapter_itemsize * self.parameters(rank), flops)

    def peft_cost(self, rank: float) -> Cost:
        """The least that PEFT moves on top of ``lora_cost``, for it is made of PyTorch's operations.

        Of a linear layer the update of y and of dx is written, read, and added to what is read and written again. Of
        experts the sum of weights and update is made and the gradient of that whole matrix: four passes over the
        weights, a product of the rows' size and three of the rank's.
        """
        cost = self.lora_cost(rank)
        if not self.is_experts:
            return Cost(
                cost.bytes + 4 * self.itemsize * sum(self.rows * (k + n) for k, n in self.projections), cost.flops
            )
        weights = sum(k * n for k, n in self.projections)
        whole = 2 * self.rows * weights + 3 * 2 * self.num_experts * rank * weights
        return Cost(cost.bytes + 4 * self.itemsize * self.num_experts * weights, cost.flops + whole)

    def sinc_passes_cost(self, rank: float, backward: bool = True) -> Cost:
        """SincUpdate's passes over the elements of the weights.

        Forward reads the weights and writes those that are multiplied. Backward reads ``dy^T x`` and the weights, and
        writes these again. The rank's products are Z each time, and those for dA and dB.
        """
        moved, products = (5, 4) if backward else (2, 1)
        elements = self.num_experts * sum(k * n for k, n in self.projections)
        return Cost(self.itemsize * moved * elements, 2 * rank * products * elements)

    def sinc_product_cost(self) -> Cost:
        """SincUpdate's third product, ``dy^T x`` in backward: it reads the rows' inputs and gradients once."""
        moved = sum(inputs * k + outputs * n + self.num_experts * k * n for inputs, outputs, k, n in self._passes())
        return Cost(self.itemsize * moved, 2 * self.rows * sum(k * n for k, n in self.projections))

    def sinc_buffer_bytes(self, rank: float) -> float:
        """Of a SincUpdate at work in backward: the weights of the largest projection, and partial sums in fp32.

        These are of dA for each 64 rows of a weight (32 in fp32 beyond rank 32), of dB for each 512 columns.
        """
        slots = _rank_slots(rank)
        rows = 32 if self.itemsize == 4 and slots > 32 else 64
        of_an_element = self.itemsize + 4 * slots * (1 / rows + 1 / 512)
        return self.num_experts * max(k * n for k, n in self.projections) * of_an_element

    def _passes(self) -> list[tuple[int, int, int, int]]:
        """Rows of input and of output in memory, K and N of each projection: tokens outside, routed rows within."""
        last = len(self.projections) - 1
        return [
            (self.tokens if index == 0 else self.rows, self.tokens if index == last else self.rows, k, n)
            for index, (k, n) in enumerate(self.projections)
        ]


@dataclass(frozen=True)
class Held:
    """Bytes that the adapters of some layers hold in a step.

    ``saved`` is for backward; ``buffer`` is of a weight that a layer at work makes, the largest of them.
    """

    adapters: float
    gradients: float
    optimizer: float
    saved: float
    buffer: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.adapters + self.gradients + self.optimizer + self.saved + self.buffer


def owned(layers: Sequence[Layer], mean_rank: float, max_rank: int) -> Held:
    """Components that are owned: FixedRank, DynamicRank on experts, and LearnedRank once it is frozen and compacted.

    The u of routed rows has a column for each component that an expert may get.
    """
    return owned_at(layers, [mean_rank] * len(layers), [max_rank] * len(layers))


def owned_at(
    layers: Sequence[Layer],
    mean_ranks: Sequence[float],
    max_ranks: Sequence[int],
    coefficients: Mapping[str, int] = MappingProxyType({}),
) -> Held:
    """``owned`` with ranks that differ by layer: the mean of its experts, and what one of them may get.

    Layers that are named in ``coefficients`` have a SincUpdate with so many for each projection: see ``sinc``.
    """
    held = u = buffer = 0.0
    for layer, mean, most in zip(layers, mean_ranks, max_ranks, strict=True):
        held += ADAPTER * layer.parameters(mean)
        if layer.name in coefficients:
            held += ADAPTER * coefficients[layer.name] * len(layer.projections)
            buffer = max(buffer, layer.sinc_buffer_bytes(mean))
        else:
            u += layer.u_bytes(most if layer.is_experts else mean)
    return Held(held, held, 2 * held, u + _inputs(layers), buffer)


def learning(layers: Sequence[Layer], mean_rank: float, max_rank: int) -> Held:
    """LearnedRank until its freeze, and any LoRA that is padded to the largest rank and masked."""
    return owned(layers, max_rank, max_rank)


def peft(layers: Sequence[Layer], mean_rank: float, max_rank: int) -> Held:
    """PEFT with the mean rank everywhere, its adapters in fp32 as it makes them.

    A linear layer keeps its input, of a bf16 model a copy of its own in fp32, and u in fp32. Experts keep their weights
    with the update in them, what the update was made of, and their rows.
    """
    saved = sum(_peft_saved(layer, mean_rank) for layer in layers)
    if all(layer.itemsize == ADAPTER for layer in layers):  # no copies: inputs are shared
        saved += _inputs(layers)
    size = ADAPTER * sum(layer.parameters(mean_rank) for layer in layers)
    return Held(size, size, 2 * size, saved)


def sinc(layers: Sequence[Layer], mean_rank: float, max_rank: int) -> Held:
    """SincUpdate with the mean rank everywhere, and coefficients for each projection.

    From forward to backward it keeps the layers' inputs alone; its buffer is that of a GPU.
    """
    every = len(layers)
    coefficients = dict.fromkeys((layer.name for layer in layers), COEFFICIENTS)
    return owned_at(layers, [mean_rank] * every, [max_rank] * every, coefficients)


ARMS: dict[str, Callable[[Sequence[Layer], float, int], Held]] = {
    "FixedRank, DynamicRank on experts": owned,
    "LearnedRank until its freeze": learning,
    "LoRA padded to the maximum": learning,
    "PEFT at the mean rank": peft,
    "SincUpdate at the mean rank": sinc,
}


def _inputs(layers: Sequence[Layer]) -> float:
    """Inputs of linear layers, each once; those of experts are kept by the frozen experts as well."""
    sizes = {x.source: x.tokens * x.projections[0][0] * x.itemsize for x in layers if not x.is_experts}
    return sum(sizes.values())


def _rank_slots(rank: float) -> int:
    """What the kernels pad a rank to: a power of two from 16 to 128, then a multiple of 128."""
    return max(16, 1 << math.ceil(math.log2(max(rank, 1)))) if rank <= 128 else 128 * math.ceil(rank / 128)


def _peft_saved(layer: Layer, rank: float) -> float:
    copied = layer.itemsize < ADAPTER
    if not layer.is_experts:
        own_input = layer.rows * layer.projections[0][0] * ADAPTER if copied else 0
        return own_input + layer.rows * rank * ADAPTER
    weights = layer.num_experts * sum(k * n for k, n in layer.projections)
    rows = layer.rows * sum(k for k, _ in layer.projections)
    return layer.itemsize * (weights + rows + (layer.parameters(rank) if copied else 0))


def largest_rank(fits: Callable[[int], bool], most: int) -> int:
    """The largest integer from 0 to ``most`` that fits, of those whose smaller ones fit too; -1 if none does."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
