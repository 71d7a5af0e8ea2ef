"""Bytes and grids of whole layers, computed from their launches on tensors that have no memory."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import chain

import pytest
import torch

from benchmarks.floors import base_cost, experts_passes_cost, lora_cost
from benchmarks.moe_providers import ROUTINGS
from benchmarks.shapes import ExpertsShape, ProjectionShape, Shape, mixtral, olmoe, qwen3
from benchmarks.static_report.launches import Launched, layer_launches, linear_launches
from tests.test_moe_launches import BACKWARD, FORWARD


@pytest.mark.parametrize("tokens", [4096, 8192, 32768])
@pytest.mark.parametrize("model", [olmoe, qwen3, mixtral])
@pytest.mark.parametrize("rank", [16, 64])
def test_bytes_are_near_the_floor(model, tokens, rank):
    """1.5 times the floor of the products alone, up to 8192 tokens; little more than the layer's own passes, always.

    And 1.5 times the adapters' own floor for what the adapters add.
    """
    layer = model(tokens)
    forward, backward = layer_launches(layer, rank)
    assert [launched.kernel for launched in forward] == FORWARD
    assert [launched.kernel for launched in backward] == [name for name in BACKWARD if name.endswith("_kernel")]
    passes: Counter[str] = Counter()
    for launched in forward + backward:
        passes[launched.kernel] += launched.cost.bytes
    products = base_cost(layer) + lora_cost(layer, rank)
    least = products + experts_passes_cost(layer)
    assert least.bytes <= passes.total() <= 1.15 * least.bytes, passes
    assert passes.total() <= (1.5 if tokens <= 8192 else 1.75) * products.bytes, passes
    adapters = passes.total() - base_cost(layer).bytes - experts_passes_cost(layer).bytes
    assert adapters <= 1.5 * lora_cost(layer, rank).bytes, passes


def test_adapters_of_more_bits_cost_their_bytes():
    half, full = (
        sum(one.cost.bytes for one in chain(*layer_launches(qwen3(8192), 16, adapter=adapter)))
        for adapter in (torch.bfloat16, torch.float32)
    )
    pools = 128 * 16 * (2048 + 2 * 768 + 768 + 2048)
    # Each pool is read by one product forward and by one backward, and its gradient is written.
    assert full - half == 2 * 3 * pools


def rows_of_experts(layer: ExpertsShape, routing: str) -> torch.Tensor:
    scores = ROUTINGS[routing](torch.rand(layer.T, layer.num_experts, generator=torch.Generator().manual_seed(0)))
    return scores.topk(layer.top_k).indices.flatten().bincount(minlength=layer.num_experts)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", [olmoe, qwen3, mixtral])
def test_no_expert_is_a_long_tail(model, routing):
    """No program of the sums over rows has more than 1/256 of all their work, or 2048 rows."""
    layer = model(8192)
    rows = rows_of_experts(layer, routing)
    for launched in layer_launches(layer, 16)[1]:
        if launched.kernel != "adapter_gradients_kernel":
            continue
        arguments = launched.arguments
        shares = (rows // arguments["share_rows"]).clamp(min=1)
        longest = int((rows / shares).max())
        columns = arguments["in_features"] + arguments["out_features"]
        column_tiles = columns // arguments["BLOCK_N"] + 1  # and the statistics
        assert int(shares.sum()) * column_tiles <= launched.grid[0]
        assert longest <= max(layer.rows * column_tiles / 256, 2048)
        partial = arguments["partial_ptr"].numel() * 4
        assert partial <= 1024 * arguments["BLOCK_N"] * arguments["BLOCK_R"] * 4


def makespan(launched: Launched, rows: list[int]) -> int:
    """Row blocks until the last program of a ``gram`` ends, where two run on each of 132 multiprocessors at once.

    A program starts as soon as one before it has ended, and costs two blocks beside its own.
    """
    block, share_rows = launched.arguments["BLOCK_M"], launched.arguments["share_rows"]
    results = -(-launched.arguments["num_cols"] // launched.arguments["BLOCK_N"])
    results *= launched.arguments["WIDTH"] // launched.arguments["BLOCK_R"]
    running, programs = [0] * 264, 0
    for size in rows:
        shares = max(size // share_rows, 1)
        blocks = -(-size // (shares * block))
        for share in range(shares):
            own = max(min(blocks, -(-size // block) - share * blocks), 0)
            for _ in range(results):
                heapq.heapreplace(running, running[0] + own + 2)
        programs += shares * results
    assert programs <= launched.grid[0]
    return max(running)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("model", [olmoe, qwen3, mixtral])
def test_a_projection_with_a_hot_expert_takes_little_longer(model, rank):
    """At most 1.3 times as long as with even routing, in each of the sums over rows of its backward pass."""
    layer = model(8192)
    even, *skewed = (rows_of_experts(layer, routing).tolist() for routing in ("random", "zipf", "hot"))
    for inputs, outputs in ((layer.hidden, 2 * layer.intermediate), (layer.intermediate, layer.hidden)):
        launches = linear_launches(ProjectionShape(layer.rows, layer.num_experts, inputs, outputs), rank)[1]
        grams = [launched for launched in launches if launched.kernel == "gram_kernel"]
        assert len(grams) == (1 if rank == 16 else 2)  # at rank 16 dB comes from the pass over dy
        for launched in grams:
            assert all(makespan(launched, rows) <= 1.3 * makespan(launched, even) for rows in skewed)


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (ExpertsShape("512 experts", 2**20, 512, 8, 7168, 2048), 256),  # 6e10 elements in the rows
        (ExpertsShape("one expert", 2**20, 1, 1, 16384, 53248), 512),  # 2^35 elements in [gate, up] and gradients
        (ExpertsShape("a token", 1, 512, 8, 7168, 2048), 1024),
        (ExpertsShape("most rows", 2**27, 4, 8, 64, 32), 4),  # 2^30 rows
        (Shape("70B", "up_proj", 2**20, 8192, 28672), 256),
        (Shape("8B", "q_proj", 2**20, 4096, 4096), 16),
        (Shape("most rows", "of a linear layer", 2**30, 64, 64), 4),
        (ProjectionShape(2**23, 512, 7168, 4096), 256),
        (ProjectionShape(2**23, 512, 2048, 7168), 16),
    ],
    ids=str,
)
def test_grids_exist(layer, rank):
    """Blocks along x are 2^31 - 1 at most, along y and z 65535; rows and programs are numbered by int32."""
    launches = layer_launches if isinstance(layer, ExpertsShape) else linear_launches
    for launched in chain(*launches(layer, rank)):
        x, *others = launched.grid
        assert 0 < x < 2**31, launched.kernel
        assert all(0 < size < 2**16 for size in others), launched.kernel
        assert all(value < 2**31 for value in launched.arguments.values() if isinstance(value, int)), launched.kernel


@pytest.mark.parametrize("rank", [16, 32, 256])
@pytest.mark.parametrize("tokens", [8192, 2**20])
def test_partial_sums_are_small(tokens, rank):
    """A quarter of dy where dB comes from one pass over it, and 34 MB in every other sum over rows."""
    for shape in (Shape("8B", "up_proj", tokens, 4096, 14336), ProjectionShape(tokens, 64, 2048, 2048)):
        for launched in linear_launches(shape, rank)[1]:
            partial = [launched.arguments.get(name) for name in ("partial_ptr", "c_ptr", "d_b_ptr")]
            size = sum(one.numel() * 4 for one in partial if one is not None)
            fused = launched.kernel in ("shrink_gram_kernel", "reduce_kernel")
            assert size <= 2**25 + (tokens * shape.N * 2 * 5 // 16 if fused else 0), launched.kernel
