"""Bytes and grids of whole MoE layers, computed from their launches on tensors that have no memory."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch

from benchmarks.floors import base_cost, experts_passes_cost, lora_cost
from benchmarks.moe_providers import ROUTINGS
from benchmarks.shapes import ExpertsShape, mixtral, olmoe, qwen3
from benchmarks.static_report.launches import layer_launches
from tests.test_moe_launches import BACKWARD, FORWARD


@pytest.mark.parametrize("tokens", [4096, 8192, 32768])
@pytest.mark.parametrize("model", [olmoe, qwen3, mixtral])
@pytest.mark.parametrize("rank", [16, 64])
def test_bytes_are_near_the_floor(model, tokens, rank):
    """1.5 times the floor of the products alone, up to 8192 tokens; little more than the layer's own passes, always."""
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


def test_adapters_of_more_bits_cost_their_bytes():
    half, full = (
        sum(one.cost.bytes for one in chain(*layer_launches(qwen3(8192), 16, adapter=adapter)))
        for adapter in (torch.bfloat16, torch.float32)
    )
    pools = 128 * 16 * (2048 + 2 * 768 + 768 + 2048)
    # Each pool is read by one product forward and by one backward, and its gradient is written.
    assert full - half == 2 * 3 * pools


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", [olmoe, qwen3, mixtral])
def test_no_expert_is_a_long_tail(model, routing):
    """No program of the sums over rows has more than 1/256 of all their work, or 2048 rows."""
    layer = model(8192)
    scores = ROUTINGS[routing](torch.rand(layer.T, layer.num_experts, generator=torch.Generator().manual_seed(0)))
    rows = scores.topk(layer.top_k).indices.flatten().bincount(minlength=layer.num_experts)
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


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (ExpertsShape("512 experts", 2**20, 512, 8, 7168, 2048), 256),  # 6e10 elements in the rows
        (ExpertsShape("one expert", 2**20, 1, 1, 16384, 53248), 512),  # 2^35 elements in [gate, up] and gradients
        (ExpertsShape("a token", 1, 512, 8, 7168, 2048), 1024),
        (ExpertsShape("most rows", 2**27, 4, 8, 64, 32), 4),  # 2^30 rows
    ],
)
def test_grids_exist(layer, rank):
    """Blocks along x are 2^31 - 1 at most, along y and z 65535; rows and programs are numbered by int32."""
    for launched in chain(*layer_launches(layer, rank)):
        x, *others = launched.grid
        assert 0 < x < 2**31, launched.kernel
        assert all(0 < size < 2**16 for size in others), launched.kernel
        assert all(value < 2**31 for value in launched.arguments.values() if isinstance(value, int)), launched.kernel
