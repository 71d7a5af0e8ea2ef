"""Two processes that share each batch learn what one learns: a price per component, functions that layers share."""

from __future__ import annotations

import copy
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lrlora_ops import FixedRank, LearnedRank, SincUpdate, apply_lora

STEPS = 30
LIMIT = timedelta(minutes=2)  # of a collective that a process waits for alone
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
        # What no method asks for need not be known everywhere: that of a recorder in one process.
        adapters.step(loss if adapters.policies[0].needs_loss or share == 0 else None)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in adapters.named_parameters()}
    return adapters.ranks(), parameters, getattr(adapters.policies[0], "rho", torch.zeros(()))


def divided_one_by_one() -> None:
    """Functions that layers share, in layers that are divided one by one."""
    model, _ = make()
    adapters = apply_lora(model, SincUpdate(**SINC, share="global"), targets="all-linear")
    wrap(model, "fsdp")
    adapters.parameters()


def divided_by_hand() -> None:
    """Outputs of a layer, as tensor parallelism divides them, once it has an adapter."""
    model, _ = make()
    apply_lora(model, FixedRank(2), targets="all-linear")
    mesh = init_device_mesh("cpu", (2,))
    model[0].up.weight = nn.Parameter(distribute_tensor(model[0].up.weight, mesh, [Shard(0)]), requires_grad=False)
    model(torch.randn(4, 12, dtype=torch.float64))


def said_of(attempt) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "nothing"


def one_of_two(share, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=share, world_size=2, timeout=LIMIT)
    results = {name: train(*run, share, 2) for name, run in RUNS.items()}
    torch.save((results, said_of(divided_one_by_one), said_of(divided_by_hand)), folder / f"{share}.pt")
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
    for found, *_ in two:
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
    assert len({float(rank) for rank in ranks.values()}) > 1, "the task must move the ranks"
    assert all(p.any() for key, p in parameters.items() if key.endswith("coefficients"))


def test_what_would_part_the_parameters_of_a_layer_says_so(two):
    for _, one_by_one, by_hand in two:
        assert re.match(r"0\.down and 1\.down had one and the same coefficients .* as fully_shard", one_by_one)
        assert re.match(r"weight is divided among processes, a DTensor, .* not by experts or outputs", by_hand)
