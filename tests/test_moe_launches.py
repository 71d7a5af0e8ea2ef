"""What a whole MoE layer asks of the GPU: how many launches, and no wait for the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lrlora_ops import Routing
from tests._launches import HostSyncError, captured, counted_launches
from tests.test_moe_lora_mlp import CASES, DEVICE, LEAVES, Case, Layer, make_layer, run

FORWARD = [
    *("count_kernel", "scatter_kernel", "shrink_kernel", "grouped_gemm_kernel"),
    *("gated_shrink_kernel", "grouped_gemm_kernel", "combine_kernel"),
]
BACKWARD = [
    *("shrink_kernel", "grouped_gemm_kernel", "gated_shrink_backward_kernel"),
    *("aten::zeros", "adapter_gradients_kernel", "adapter_gradients_kernel", "grouped_gemm_kernel", "combine_kernel"),
]


def launches(layer: Layer, **options) -> tuple[list[str], list[str]]:
    """Of forward and of backward, with all gradients and the counting of what is routed."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in layer.leaves.items()}
    demand = torch.zeros(2, layer.table.num_experts, device=layer.dy.device, requires_grad=True)
    with counted_launches() as forward:
        y = run(layer, leaves, backend="triton", demand=demand, **options)
    with counted_launches() as backward:
        torch.autograd.grad(y, [*leaves.values(), demand], layer.dy)
    return forward, backward


@pytest.mark.parametrize("adapters", [torch.float32, torch.float16], ids=str)
def test_launches_of_a_layer(adapters):
    """At most 8 in each direction, whatever the adapters' dtype, and none that waits."""
    layer = make_layer(CASES["silu by name"], DEVICE["triton"]).cast(torch.float16, adapters)
    forward, backward = launches(layer)
    assert forward == FORWARD
    assert backward == BACKWARD
    assert max(len(forward), len(backward)) <= 8


def test_launches_with_the_models_own_activation():
    """More, for its operations and the generic form of the products; also none that waits."""
    forward, backward = launches(make_layer(CASES["swiglu"], DEVICE["triton"]))
    assert len(forward) <= 12 and len(backward) <= 41


def test_frozen_adapters_cost_no_sums():
    """x alone has a gradient: neither zeros nor sums over rows."""
    layer = make_layer(CASES["silu by name"], DEVICE["triton"])
    leaves = layer.leaves | {"x": layer.leaves["x"].requires_grad_()}
    y = run(layer, leaves, backend="triton")
    with counted_launches() as backward:
        torch.autograd.grad(y, leaves["x"], layer.dy)
    assert backward == [name for name in BACKWARD if name not in ("aten::zeros", "adapter_gradients_kernel")]


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.unique(),
        lambda t: bool(t.any()),
        lambda t: torch.equal(t, t + 1),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: np.asarray(t),
        lambda t: [float(value) for value in t],
    ],
)
def test_a_wait_is_noticed(wait):
    with pytest.raises(HostSyncError), counted_launches():
        wait(torch.ones(3))


def test_operations_are_counted():
    index = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE["triton"])
    with counted_launches() as launched:
        x = torch.empty(3, 4).zero_().t()[1:].view(3, 3)
        (x + 1).sum(0)
        torch.empty(0, 4) + 1
        Routing.from_topk(index, 4, "triton")
    assert launched == ["aten::zero_", "aten::add", "aten::sum", "count_kernel", "scatter_kernel"]


def grow(layer: Layer, ranks: list[int]) -> None:
    """The components that are born have values: what they change must show."""
    born = layer.table.set_ranks(ranks)
    for name in LEAVES[2:]:
        fresh = torch.randn(layer.leaves[name][born].shape, generator=torch.Generator().manual_seed(1))
        layer.leaves[name][born] = 0.3 * fresh.to(layer.dy.device)


@pytest.mark.gpu
def test_graph_follows_the_ranks_and_the_routing():
    """Captured once, forward and backward; ranks that grow and other choices show at the next replay, bit for bit."""
    layer = make_layer(replace(CASES["silu by name"], tokens=300), "cuda")
    layer.leaves = {name: t.nan_to_num().requires_grad_() for name, t in layer.leaves.items()}
    demand = torch.zeros(2, 4, device="cuda", requires_grad=True)
    inputs = [*layer.leaves.values(), demand]

    def step() -> list[Tensor]:
        y = run(layer, layer.leaves, backend="triton", demand=demand)
        return [y, *torch.autograd.grad(y, inputs, layer.dy)]

    graph, results = captured(step)
    previous: list[Tensor] = []
    for ranks in ([3, 0, 6, 2], [4, 1, 6, 3], [6, 1, 0, 6], [0, 0, 0, 0]):
        with torch.no_grad():
            grow(layer, ranks)
        layer.index.copy_(torch.rand(300, 4, device="cuda").topk(layer.index.shape[1]).indices)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in results]
        for name, one, other in zip(("y", *LEAVES, "demand"), replayed, step(), strict=True):
            assert torch.equal(one, other), name
        assert not previous or not torch.equal(replayed[0], previous[0])
        previous = replayed


@pytest.mark.gpu
def test_launches_on_the_gpu():
    """As the profiler sees them, at a size at which the sums over rows are not split."""
    layer = make_layer(Case(tokens=64, activation="silu"), "cuda").cast(torch.bfloat16, torch.float32)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in layer.leaves.items()}

    def step() -> None:
        torch.autograd.grad(run(layer, leaves, backend="triton"), list(leaves.values()), layer.dy)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) <= len(FORWARD) + len(BACKWARD), launched
