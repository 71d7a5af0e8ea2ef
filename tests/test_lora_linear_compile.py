"""lora_linear and its module under torch.compile(fullgraph=True): one graph for every rank, and the same numbers."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import VariableRankLoRALinear, lora_linear

DEVICE = {"eager": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
each_backend = pytest.mark.parametrize("backend", DEVICE)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled:
    """A function compiled on its first call; from then on a recompilation is an error."""

    def __init__(self, function, compiler: str = "aot_eager", dynamic: bool | None = None) -> None:
        self.function = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        with torch.compiler.set_stance("default" if self.calls == 1 else "fail_on_recompile"):
            return self.function(*args)


def run(function, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients, with the same random seed."""
    torch.manual_seed(0)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves])]


@each_backend
def test_a_rank_tensor_never_recompiles(backend):
    """Any rank, and another batch: forward, all gradients and the sensitivity equal the uncompiled ones."""
    device = DEVICE[backend]
    lora_A, lora_B = (torch.randn(20, n, device=device, requires_grad=True) for n in (9, 7))
    gate = torch.rand(20, device=device, requires_grad=True)
    rank = torch.zeros((), dtype=torch.int32, device=device)
    weight, bias = torch.randn(7, 9, device=device), torch.randn(7, device=device)

    def function(x: Tensor) -> Tensor:
        frozen = {"weight": weight, "bias": bias, "gate": gate}
        return lora_linear(x, lora_A, lora_B, rank=rank, dropout=0.3, backend=backend, **frozen)

    compiled = Compiled(function, dynamic=True)
    for value, batch in ((5, 4), (0, 4), (20, 6), (17, 3)):
        rank.fill_(value)
        x = torch.randn(batch, 2, 9, device=device, requires_grad=True)
        actual, expected = (run(f, x, [lora_A, lora_B, gate]) for f in (compiled, function))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_module_never_recompiles_in_training():
    """set_rank, a method that writes the sampled prefix and the gate, and the statistics that come back."""
    layer = VariableRankLoRALinear(9, 7, max_rank=20, rank=4)
    nn.init.normal_(layer.lora_B)
    compiled = Compiled(layer)
    table = layer.table

    def sample() -> None:
        table.train_ranks.fill_(9)
        with torch.no_grad():
            layer.lora_B.normal_()
            table.gate[8] = 0

    for change in (lambda: None, lambda: layer.set_rank(2), lambda: layer.set_rank(20), sample, table.clear_statistics):
        change()
        x = torch.randn(5, 9)
        results = []
        for function in (compiled, layer):
            for t in (layer.lora_A, layer.lora_B, table.gate):
                t.grad = None
            y = function(x)
            y.square().sum().backward()
            results.append([y.detach(), layer.lora_A.grad, layer.lora_B.grad, layer.sensitivity])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert layer.sensitivity[8] and not layer.sensitivity[9:].any()


def test_evaluation_and_training_are_one_graph_each():
    layer = VariableRankLoRALinear(9, 7, max_rank=8, rank=4, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 9)
    for mode in (True, False):
        layer.train(mode)
        compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for mode in (True, False, True):
            layer.train(mode)
            layer.set_rank(5 + mode)
            torch.manual_seed(0)
            actual = compiled(x)
            torch.manual_seed(0)
            assert mode or torch.equal(actual, layer(x))


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_inductor():
    """The default compiler, across a rank change."""
    layer = VariableRankLoRALinear(9, 7, max_rank=8, rank=3)
    nn.init.normal_(layer.lora_B)
    compiled = Compiled(layer, "inductor")
    for rank in (3, 8):
        layer.set_rank(rank)
        x = torch.randn(5, 9, requires_grad=True)
        leaves = [layer.lora_A, layer.lora_B]
        for one, other in zip(run(compiled, x, leaves), run(layer, x, leaves), strict=True):
            torch.testing.assert_close(one, other)
