"""Two processes under a penalty, whose loss is averaged too, learn the ranks that one process learns."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lrlora_ops import LearnedRank, apply_lora

STEPS = 40


def train(method, share, of):
    """Train on every ``of``-th row from ``share`` on; gradients are averaged over the processes as DDP does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    teacher = copy.deepcopy(model)
    teacher[2].weight.data += 0.5 * torch.randn(16, 1) @ torch.randn(1, 24)
    adapters = apply_lora(model, method, targets="all-linear")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3, weight_decay=0)
    for step in range(STEPS):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))[share::of]
        loss = (model(x) - teacher(x)).square().mean()
        loss.backward()
        for parameter in adapters.parameters() if of > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= of
        adapters.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: int(rank) for name, rank in adapters.ranks().items()}, adapters.policies[0].rho


def one_of_two(share, method, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=share, world_size=2)
    torch.save(train(method, share, 2), folder / f"{share}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    method = LearnedRank(mean_rank=3, max_rank=8, total_steps=STEPS, penalty=1e-3)
    mp.spawn(one_of_two, (method, tmp_path), nprocs=2)
    ranks, rho = train(method, 0, 1)
    for share in range(2):
        found, found_rho = torch.load(tmp_path / f"{share}.pt")
        assert found == ranks
        torch.testing.assert_close(found_rho, rho, rtol=1e-3, atol=1e-3)
    assert len(set(ranks.values())) > 1, "the task must move the ranks"
