"""What SincUpdate holds and moves: memory of a training step on a CPU, and launches and bytes on a GPU, computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import sinc
from benchmarks.floors import H200, Cost, base_cost, sinc_cost, sinc_passes_cost
from benchmarks.goals import goals
from benchmarks.memory import peak_bytes
from benchmarks.providers import FORWARD_BACKWARD
from benchmarks.shapes import LONG_SHAPES, Shape
from benchmarks.static_report.launches import sinc_launches
from lrlora_ops import SincLoRALinear
from lrlora_ops._storage import saved_bytes

CPU = torch.device("cpu")
ROWS, WIDTH = 16, 2048  # few rows: what is measured here does not depend on them
MATRIX = 4 * WIDTH * WIDTH


def problem_of(width: int) -> sinc.SincProblem:
    return sinc.SincProblem.random(Shape("square", "linear", ROWS, width, width), torch.float32, 16, CPU)


def peak(problem: sinc.SincProblem, builder: str) -> int:
    return peak_bytes(sinc.BUILDERS[builder](problem, 16).step(FORWARD_BACKWARD), CPU)


@pytest.mark.parametrize("peer", ["loop", pytest.param("stacked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [1024, pytest.param(WIDTH, marks=pytest.mark.slow)])
def test_a_fifth_of_the_memory_of_autograd(width, peer):
    problem = problem_of(width)
    assert 0 < 5 * peak(problem, "lrlora") <= peak(problem, peer)


def test_a_model_needs_two_matrices_whatever_its_depth():
    """Beyond activations: from forward to backward nothing is kept but each layer's input."""
    problem = problem_of(WIDTH)
    layers = [sinc.BUILDERS["lrlora"](problem, 16).layer for _ in range(3)]
    assert all(isinstance(layer, SincLoRALinear) for layer in layers)

    def peak_of(depth: int) -> int:
        model = nn.Sequential(*layers[:depth])
        parameters = [p for p in model.parameters() if p.requires_grad]
        return peak_bytes(lambda: torch.autograd.grad(model(problem.x), [problem.x, *parameters], problem.dy), CPU)

    one, three = peak_of(1), peak_of(3)
    adapter = sum(p.numel() * p.element_size() for p in layers[0].parameters() if p.requires_grad)
    activations = 3 * 2 * 4 * ROWS * WIDTH
    assert MATRIX / 8 < one <= three <= 2 * MATRIX
    assert three <= one + 2 * adapter + activations

    forward: list[Tensor] = []
    resident = [p for layer in layers for p in layer.parameters()]
    saved = saved_bytes(lambda: forward.append(nn.Sequential(*layers)(problem.x)), resident)
    assert saved <= 3 * 4 * (ROWS * WIDTH + sinc.NUM_COEFFICIENTS)


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_launches_move_little_more_than_the_passes(shape):
    """Partial sums of dA and dB are the rest."""
    forward, backward = sinc_launches(shape, 16)
    assert [launched.kernel for launched in forward] == ["sinc_weight_kernel"]
    assert [launched.kernel for launched in backward] == ["sinc_gradients_kernel", *["reduce_kernel"] * 3]
    least = sinc_passes_cost(shape, 16)
    assert least.bytes < sum(launched.cost.bytes for launched in forward + backward) <= 1.25 * least.bytes
    least = sinc_passes_cost(shape, 16, backward=False)
    assert least.bytes < sum(launched.cost.bytes for launched in forward) <= 1.02 * least.bytes


def test_three_products_and_the_passes_are_within_the_goal():
    """As bytes and FLOPs have it: 1.6 times the frozen layer, and the passes."""
    for shape in LONG_SHAPES:
        base, all_of_it = base_cost(shape), base_cost(shape) + sinc_cost(shape, 16)
        limit = 1.6 * base.floor_ms(H200) + sinc_passes_cost(shape, 16).floor_ms(H200)
        assert all_of_it.floor_ms(H200) <= limit
        assert all_of_it.flops > 1.5 * base.flops


def test_the_goal_is_of_the_layer_s_own_base():
    case = sinc.cases(torch.device("cuda"))[0]

    def row(provider: str, milliseconds: float) -> dict:
        time = {"median": milliseconds, "p20": milliseconds, "p80": milliseconds}
        return {"case": case.id, "provider": provider, "mode": FORWARD_BACKWARD, "time": time, "overhead": None}

    machine = {"name": "bf16", "bandwidth": 4e12, "flops": 8e14}
    content = {"device": "H200", "machines": [machine], "rows": [row("base", 1.0), row("lrlora", 1.7)]}
    (goal,) = (goal for goal in goals(content) if goal.text.startswith("sinc"))
    passes = 1e3 * 2 * 5 * case.shape.K * case.shape.N / 4e12
    assert goal.limit == pytest.approx(1.6 + passes)
    assert (goal.measured, goal.verdict) == (1.7, "NOT met")


def test_costs_by_hand():
    shape = Shape("", "", 6, 4, 8)
    assert sinc_passes_cost(shape, 3, 2) == Cost(2 * 5 * 32, 2 * 3 * 4 * 32)
    assert sinc_cost(shape, 3, 2, backward=False) == Cost(2 * 2 * 32, 2 * 3 * 32)
    assert sinc_cost(shape, 3, 2) == Cost(2 * 5 * 32 + 2 * (24 + 48 + 32), 2 * 3 * 4 * 32 + 2 * 6 * 32)
