"""A training step of a module, captured once as a CUDA graph: its replays follow ranks that change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from lrlora_ops import VariableRankLoRAGroupedLinear, VariableRankLoRALinear
from tests._launches import captured

CAPACITY, FEATURES = 40, (264, 200)
SIZES = (7, 1500, 0, 300)  # the long expert's rows are cut into shares
Step = Callable[[], list[Tensor]]


def training_step(module: VariableRankLoRALinear | VariableRankLoRAGroupedLinear, rows: int, *routing: Tensor) -> Step:
    """Output and gradients of x, A, B and the gates."""
    device, dtype = module.lora_A.device, module.weight.dtype
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, n, generator=generator).to(device, dtype) for n in FEATURES)
    inputs = (x.requires_grad_(), module.lora_A, module.lora_B, module.table.gate)

    def step() -> list[Tensor]:
        y = module(x, *routing)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    return step


def dense(device: str, dtype: torch.dtype) -> tuple[Step, Tensor, list[Callable[[], None]]]:
    """A step, the B whose rows are born as zeros, and what changes the ranks."""
    base = torch.nn.Linear(*FEATURES, device=device, dtype=dtype)
    module = VariableRankLoRALinear.from_linear(base, max_rank=CAPACITY, rank=3)
    changes = [lambda rank=rank: module.set_rank(rank) for rank in (9, 40, 0, 17)]
    return training_step(module, sum(SIZES)), module.lora_B, changes


def grouped(device: str, dtype: torch.dtype) -> tuple[Step, Tensor, list[Callable[[], None]]]:
    """The same, with experts whose pool is shared."""
    settings = {"max_rank": CAPACITY, "rank": 3, "pool_rank": 16, "device": device}
    module = VariableRankLoRAGroupedLinear(len(SIZES), *FEATURES, **settings).to(dtype)
    offsets = torch.tensor([0, *accumulate(SIZES)], dtype=torch.int32, device=device)
    table = ([4, 3, 5, 3], [9, 40, 6, 3], [0, 0, 0, 0], [1, 20, 0, 16])
    changes = [lambda ranks=ranks: module.set_ranks(ranks) for ranks in table]
    return training_step(module, sum(SIZES) + 9, offsets), module.lora_B, changes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [dense, grouped])
def test_replays_follow_the_ranks(make, dtype):
    """Bit for bit what the step gives without the graph, and not what it gave before the ranks changed."""
    step, lora_b, changes = make("cuda", dtype)
    graph, results = captured(step)
    previous: list[Tensor] = []
    for change in changes:
        change()
        with torch.no_grad():  # components are born with b = 0: what they change must show
            lora_b.copy_(torch.randn(lora_b.shape, generator=torch.Generator().manual_seed(1)))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in results]
        for name, one, other in zip(("y", "x", "A", "B", "gate"), replayed, step(), strict=True):
            assert torch.equal(one, other), name
            assert torch.isfinite(one).all(), name
        assert not previous or not torch.equal(replayed[0], previous[0])
        previous = replayed
