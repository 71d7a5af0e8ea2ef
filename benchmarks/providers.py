"""Who is timed: this library and its peers behind one interface, and the fp64 oracle they have to agree with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Shape
from lrlora_ops import VariableRankLoRALinear

SCALING = 2.0
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
MODES = (FORWARD, FORWARD_BACKWARD)
# Relative root mean square error. Plain PyTorch is at about a third of it: a result is rounded more than once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Unavailable(Exception):
    """A peer cannot run on this machine; the message says why and what to install."""


@dataclass(frozen=True)
class Problem:
    """The tensors that all providers of a case share; products are of order one.

    x ``[M, K]`` requires a gradient, dy ``[M, N]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[R, N]``.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, max_rank: int, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)

        return cls(
            x=normal(shape.M, shape.K, 1).requires_grad_(),
            dy=normal(shape.M, shape.N, 1),
            weight=normal(shape.N, shape.K, shape.K**-0.5),
            lora_A=normal(max_rank, shape.K, shape.K**-0.5),
            lora_B=normal(max_rank, shape.N, max_rank**-0.5),
        )


@dataclass(frozen=True)
class Provider:
    """A layer with an adapter, and what its backward pass differentiates by.

    ``leaves`` are lora_A, lora_B, gate and so on under the oracle's names, those that the layer has; ``canonical``
    brings the gradient of one of them into the oracle's layout. ``state`` is what the layer holds beside its
    parameters and buffers.
    """

    problem: Problem
    layer: nn.Module
    rank: int
    leaves: dict[str, Tensor] = field(default_factory=dict)
    canonical: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient
    state: tuple[Tensor, ...] = ()

    def step(self, mode: str) -> Callable[[], object]:
        """What is timed: inference, or a training step of the layer with the gradients of x and the adapter."""
        training = mode == FORWARD_BACKWARD
        self.layer.train(training)
        return self._forward_backward if training else self._forward

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self.layer(self.problem.x)

    def _forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.layer(self.problem.x), (self.problem.x, *self.leaves.values()), self.problem.dy)

    def results(self) -> dict[str, Tensor]:
        """The output, and the gradients by name, components as rows."""
        self.layer.eval()
        y = self._forward()
        self.layer.train()
        gradients = self._forward_backward()
        results = dict(zip(("y", "x", *self.leaves), (y, *gradients), strict=True))
        return {name: self.canonical(name, result) for name, result in results.items()}

    def resident(self) -> list[Tensor]:
        """What exists anyway, whether a backward pass is to follow or not."""
        return [*self.layer.parameters(), *self.layer.buffers(), *self.leaves.values(), *self.state]


def base(problem: Problem, rank: int) -> Provider:
    """The frozen layer alone; its rank is 0 whatever was asked for."""
    return Provider(problem, _linear(problem), 0)


def lrlora(problem: Problem, rank: int) -> Provider:
    """This library's module, the first ``rank`` components live; its backward pass yields the sensitivity too."""
    max_rank = problem.lora_A.shape[0]
    layer = VariableRankLoRALinear.from_linear(
        _linear(problem), max_rank=max_rank, rank=rank, lora_alpha=SCALING * max_rank
    )
    with torch.no_grad():
        layer.lora_A.copy_(problem.lora_A)
        layer.lora_B.copy_(problem.lora_B)
    leaves = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "gate": layer.table.gate}
    return Provider(problem, layer, rank, leaves, state=(layer.table.train_ranks,))


def peft(problem: Problem, rank: int, accelerated: bool = False) -> Provider:
    """PEFT's LoRA layer, its adapter in the base layer's dtype like all others here; on this library's ops if asked."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"PEFT cannot be imported ({error}); pip install peft") from error
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["layer"])
    model = nn.ModuleDict({"layer": _linear(problem)})
    inject_adapter_in_model(config, model)
    if accelerated:
        accelerate_all(model)
    layer: Any = model["layer"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        lora_a.copy_(problem.lora_A[:rank])
        lora_b.copy_(problem.lora_B[:rank].t())
    leaves = {"lora_A": lora_a, "lora_B": lora_b}
    return Provider(problem, layer, rank, leaves, lambda name, result: result.t() if name == "lora_B" else result)


def accelerate_all(model: nn.Module) -> None:
    """Every LoRA layer of PEFT on this library's ops."""
    from lrlora_ops.integrations.peft import accelerate

    result = accelerate(model)
    if result.left:
        raise Unavailable(str(result))


class PlainLoRA(nn.Module):
    """LoRA as it is written down: ``x W^T + scaling (x A^T) B``."""

    def __init__(self, problem: Problem, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        self.lora_A = nn.Parameter(problem.lora_A[:rank].clone())
        self.lora_B = nn.Parameter(problem.lora_B[:rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + SCALING * (x @ self.lora_A.t()) @ self.lora_B


class AddmmLoRA(PlainLoRA):
    """The same with the second product added to the base product by BLAS, as hand-written PyTorch kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(F.linear(x, self.weight), x @ self.lora_A.t(), self.lora_B, alpha=SCALING)


def eager(problem: Problem, rank: int) -> Provider:
    """``PlainLoRA`` as it is."""
    return _plain(problem, rank, PlainLoRA(problem, rank))


def addmm(problem: Problem, rank: int) -> Provider:
    """``AddmmLoRA`` as it is."""
    return _plain(problem, rank, AddmmLoRA(problem, rank))


def compiled(problem: Problem, rank: int) -> Provider:
    """``PlainLoRA`` under ``torch.compile``."""
    compiler = os.environ.get("CXX", "g++")
    if problem.x.device.type == "cpu" and not shutil.which(compiler):
        raise Unavailable(f"torch.compile needs a C++ compiler on the CPU, and there is no {compiler}; install it")
    torch.compiler.reset()  # what it has compiled for other cases counts towards a limit of recompilations
    module = PlainLoRA(problem, rank)
    provider = _plain(problem, rank, module)
    module.compile(fullgraph=True, dynamic=False)
    return provider


BUILDERS: dict[str, Callable[[Problem, int], Provider]] = {
    "base": base,
    "lrlora": lrlora,
    "PEFT": peft,
    "PEFT, accelerated": partial(peft, accelerated=True),
    "eager": eager,
    "addmm": addmm,
    "compile": compiled,
}


def _linear(problem: Problem) -> nn.Linear:
    out_features, in_features = problem.weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    return layer


def _plain(problem: Problem, rank: int, module: PlainLoRA) -> Provider:
    return Provider(problem, module, rank, {"lora_A": module.lora_A, "lora_B": module.lora_B})


class Oracle:
    """What a provider must compute, in fp64: the products with the weight once, the update by autograd."""

    def __init__(self, problem: Problem) -> None:
        self.problem, weight = problem, problem.weight.double()
        self.y = problem.x.detach().double() @ weight.t()
        self.d_x = problem.dy.double() @ weight

    def expected(self, rank: int) -> dict[str, Tensor]:
        """The output, and the gradients of x, lora_A, lora_B and gate, zero for components from ``rank`` on."""
        p = self.problem
        x, lora_A, lora_B = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
        gate = torch.ones(p.lora_A.shape[0], dtype=torch.float64, device=x.device, requires_grad=True)
        update = SCALING * (x @ lora_A[:rank].t() * gate[:rank]) @ lora_B[:rank]
        d_x, d_a, d_b, d_gate = torch.autograd.grad(update, (x, lora_A, lora_B, gate), p.dy.double())
        return {"y": self.y + update.detach(), "x": self.d_x + d_x, "lora_A": d_a, "lora_B": d_b, "gate": d_gate}

    def check(self, provider: Provider) -> None:
        """Compare a provider's output and gradients; raises as ``compare`` does."""
        expected = self.expected(provider.rank)
        results = provider.results()
        compare({name: expected[name][: result.shape[0]] for name, result in results.items()}, results)


def compare(expected: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Results against the oracle's, in relative norm.

    Raises:
        AssertionError: One of them is further off than ``TOLERANCE``, or is not finite.
    """
    limit = TOLERANCE[results["y"].dtype]
    for name, actual in results.items():
        error = float((actual.double() - expected[name]).norm() / expected[name].norm())
        assert error <= limit, f"parity: {name} has a relative error of {error:.2g}, above {limit:.0e}; not timed"
