"""Two processes that share each batch learn what one learns: a price per component, functions that layers share."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lrlora_ops import LearnedRank, SincUpdate, apply_lora

STEPS = 30
SINC = {"rank": 2, "num_coefficients": 5, "grid": 0.05}
# A method, and what divides the work.
RUNS = {
    "a price per component": (LearnedRank(mean_rank=3, max_rank=8, total_steps=STEPS, penalty=1e-3), "ddp"),
    "functions of a kind of layer": (SincUpdate(**SINC, share="type"), "ddp"),
    "functions of a layer, divided": (SincUpdate(**SINC), "fsdp"),
    "functions of all layers, divided at once": (SincUpdate(**SINC, share="global"), "fsdp, whole"),
}


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def make() -> tuple[nn.Module, nn.Module]:
    """A model in fp64, where rounding is no excuse, and what it shall become: a bit of its layers is another."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    teacher = copy.deepcopy(model)
    teacher[1].up.weight.data += 0.3 * torch.randn(24, 1) @ torch.randn(1, 12)
    return model, teacher


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model if how == "fsdp" else ():
        fully_shard(block)
    return fully_shard(model)


def train(method, how: str, share: int, of: int):
    """Ranks, parameters, and what the policy learned, after training on every ``of``-th row from ``share`` on."""
    model, teacher = make()
    adapters = apply_lora(model, method, targets="all-linear")
    called = wrap(model, how) if of > 1 else model
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3, weight_decay=0)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 12, generator=generator, dtype=torch.float64)[share::of]
        loss = (called(x) - teacher(x)).square().mean()
        loss.backward()
        adapters.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in adapters.named_parameters()}
    return adapters.ranks(), parameters, getattr(adapters.policies[0], "rho", torch.zeros(()))


def refused(share: int) -> str:
    """Functions that layers share, in layers that are divided one by one."""
    model, _ = make()
    adapters = apply_lora(model, SincUpdate(**SINC, share="global"), targets="all-linear")
    try:
        wrap(model, "fsdp")
        adapters.parameters()
    except ValueError as error:
        return str(error)
    return ""


def one_of_two(share, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=share, world_size=2)
    results = {name: train(*run, share, 2) for name, run in RUNS.items()}
    torch.save((results, refused(share)), folder / f"{share}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{share}.pt") for share in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(two, name):
    method, how = RUNS[name]
    expected = train(method, how, 0, 1)
    ranks, parameters, _ = expected
    for found, _ in two:
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)
    assert len({float(rank) for rank in ranks.values()}) > 1, "the task must move the ranks"
    assert all(p.any() for key, p in parameters.items() if key.endswith("coefficients"))


def test_shared_functions_that_are_divided_layer_by_layer(two):
    for _, said in two:
        print(said)
        assert "share" in said
