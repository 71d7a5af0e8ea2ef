"""A run that is saved and continued is the uninterrupted one, bit for bit; compacting and merging keep it so."""

import copy

import pytest
import torch
from torch import nn

from lrlora_ops import FixedRank, LearnedRank, apply_lora

STEPS = 40


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Run:
    """A model, its adapters and their optimizer, all from the same seed every time."""

    def __init__(self, method=None):
        torch.manual_seed(0)
        self.model, self.teacher = Residual(), Residual()
        method = method or LearnedRank(mean_rank=4, max_rank=8, total_steps=STEPS)
        self.adapters = apply_lora(self.model, method, targets="all-linear")
        self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=5e-3, weight_decay=0)

    def train(self, first, end):
        self.model.train()
        losses = []
        for step in range(first, end):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - self.teacher(x)).square().mean()
            loss.backward()
            self.adapters.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def output(self):
        return self.model.eval()(torch.linspace(-1, 1, 80).view(5, 16)).detach()


# Before the first step, after it, in the middle, one step before the freeze, after it.
@pytest.mark.parametrize("stop", [0, 1, 17, 31, 33])
def test_a_resumed_run_is_the_uninterrupted_one(stop, tmp_path):
    whole = Run()
    expected = whole.train(0, STEPS)
    first = Run()
    first.train(0, stop)
    first.adapters.save(tmp_path)

    second = Run()
    second.adapters.load(tmp_path)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))

    assert second.train(stop, STEPS) == expected[stop:]
    assert second.adapters.ranks() == whole.adapters.ranks()
    assert sum(map(int, whole.adapters.ranks().values())) == 4 * 6
    assert torch.equal(second.output(), whole.output())


def test_compacting_after_the_freeze_changes_no_step(tmp_path):
    plain, compacted = Run(), Run()
    plain.train(0, STEPS), compacted.train(0, STEPS)
    compacted.adapters.compact(compacted.optimizer)

    for name, module in compacted.adapters.modules.items():
        assert module.max_rank == module.lora_A.shape[0] == int(plain.adapters.ranks()[name])
    assert all(
        moment.shape == parameter.shape
        for parameter in compacted.adapters.parameters()
        for key, moment in compacted.optimizer.state[parameter].items()
        if key.startswith("exp_avg")
    )
    # A sum over fewer rows may be ordered differently, so the comparison allows for rounding.
    torch.testing.assert_close(compacted.train(STEPS, STEPS + 5), plain.train(STEPS, STEPS + 5))

    compacted.adapters.save(tmp_path)
    reloaded = Run()
    reloaded.adapters.load(tmp_path)
    assert torch.equal(reloaded.output(), compacted.output())


def test_compacting_while_ranks_are_learned_is_refused():
    run = Run()
    run.train(0, 3)
    with pytest.raises(RuntimeError, match="LearnedRank still changes ranks; compact after its freeze"):
        run.adapters.compact(run.optimizer)


@pytest.mark.parametrize("method", [None, FixedRank(3)])
def test_merging_gives_a_plain_model_with_the_same_output(method):
    run = Run(method)
    run.train(0, STEPS)
    adapted = run.output()
    merged = run.adapters.merge()

    assert merged is run.model
    assert {type(m) for m in merged.modules() if not list(m.children())} == {nn.Linear, nn.Tanh}
    torch.testing.assert_close(run.output(), adapted)
    torch.manual_seed(0)
    assert not torch.allclose(Residual()(torch.linspace(-1, 1, 80).view(5, 16)), adapted)
