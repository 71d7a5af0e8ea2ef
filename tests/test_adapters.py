"""Adapters: a model that learns, is shown, compacted and merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, apply_lora
from tests._models import ALL, IDS, Model, optimize, trained


def learn(model: nn.Module, adapters, steps: int, optimizer: torch.optim.Optimizer, seed: int = 2) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(30, (4, 8), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (7 * ids + 3).flatten() % 30)
        losses.append(optimize(loss, adapters, optimizer))
    return losses


def test_ranks_and_summary(capsys):
    model = Model()
    adapters = apply_lora(model, {"q_proj": FixedRank(5), "mlp.up": FixedRank(2)})
    model.layers[1].q_proj.set_rank(3)
    ranks = adapters.ranks()
    assert {name: int(rank) for name, rank in ranks.items()} == {
        "layers.0.q_proj": 5,
        "layers.1.q_proj": 3,
        "layers.0.mlp.up": 2,
        "layers.1.mlp.up": 2,
    }
    assert all(rank.shape == () and rank.dtype == torch.int32 for rank in ranks.values())
    ranks["layers.0.q_proj"].fill_(0)
    assert int(model.layers[0].q_proj.rank) == 5
    text = adapters.summary()
    assert capsys.readouterr().out == text + "\n"
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:-1]}
    assert rows["layers.1.q_proj"] == ["1", "12", "12", "3", "5", "72", f"{5 * 24 * 4 / 1024:.1f}"]
    live, held = 8 * 24 + 4 * 32, (10 * 24 + 4 * 32) * 4 / 1024
    assert text.splitlines()[-1].split() == ["total", "of", "4", "12", str(live), f"{held:.1f}"]


@pytest.mark.parametrize("method", [FixedRank(4), LearnedRank(3, 6, total_steps=12)], ids=str)
def test_training_lowers_the_loss_and_touches_nothing_but_adapters(method):
    model = Model()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapters = apply_lora(model, method, "all-linear")
    losses = learn(model, adapters, 30, torch.optim.AdamW(adapters.parameters(), lr=2e-2, weight_decay=0))
    assert losses[-1] < 0.9 * losses[0]
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())
    assert sum(int(rank) for rank in adapters.ranks().values()) == method.initial_rank * len(ALL)
    assert not any(m.sensitivity.any() for m in adapters.modules.values()), "step() clears the statistics"


def learned(model: nn.Module, steps: int = 12):
    """Adapters of different ranks, frozen, and their optimizer."""
    adapters = apply_lora(model, LearnedRank(3, 6, total_steps=steps, lr=0.8), "all-linear")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0)
    learn(model, adapters, steps, optimizer)
    return adapters, optimizer


def test_compacted_adapters_train_on_as_before():
    """Output, gradients and the optimizer's steps, with fewer rows; the parameters keep their identity."""
    runs = []
    for compact in (False, True):
        model = Model()
        adapters, optimizer = learned(model)
        before = model(IDS)
        ranks = {name: int(rank) for name, rank in adapters.ranks().items()}
        assert len(set(ranks.values())) > 1
        if compact:
            parameters = adapters.parameters()
            adapters.compact(optimizer)
            assert all(a is b for a, b in zip(parameters, adapters.parameters(), strict=True))
            assert {name: m.max_rank for name, m in adapters.modules.items()} == ranks
            assert {name: int(rank) for name, rank in adapters.ranks().items()} == ranks
            for p in parameters:
                assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape
                assert optimizer.state[p]["step"] == 12
            torch.testing.assert_close(model(IDS), before)
        runs.append(learn(model, adapters, 5, optimizer, seed=9))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_compacting_too_early_is_an_error():
    model = Model()
    adapters = apply_lora(model, {"q_proj": FixedRank(2), "mlp.*": LearnedRank(2, 4, total_steps=9)})
    with pytest.raises(RuntimeError, match="LearnedRank still changes ranks; compact after its freeze"):
        adapters.compact()
    assert model.layers[0].mlp["up"].max_rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_merge(dtype, compact):
    """The same logits from a model that knows nothing of adapters."""
    model = Model().to(dtype)
    adapters, _ = learned(model)
    if compact:
        adapters.compact()
    expected = model.eval()(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = adapters.merge()
    assert merged is model
    assert set(model.state_dict()) == set(Model().state_dict())
    assert not any(isinstance(m, VariableRankLoRALinear) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    error = (model(IDS) - expected).norm() / expected.norm()
    assert error < tolerance
    plain = Model().to(dtype)
    assert (plain(IDS) - expected).norm() / expected.norm() > 2 * tolerance
    assert adapters.modules == {}
    apply_lora(model, FixedRank(2), "all-linear")


def test_merge_is_all_or_nothing():
    model = trained(Model())
    adapters = apply_lora(model, FixedRank(2), "all-linear")
    trained(model)
    nn.init.constant_(model.layers[1].mlp["down"].lora_A, torch.nan)
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.down: the merged layer differs"):
        adapters.merge()
    assert dict(model.named_modules()) == modules and len(adapters.modules) == len(ALL)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_merging_a_tied_head_warns():
    """The embedding keeps the old weight, and a config that ties them would undo the merge on loading."""
    model = Model(tied=True)
    adapters = apply_lora(model, FixedRank(2), "lm_head")
    trained(model)
    expected, embedding = model(IDS), model.embed.weight.clone()
    with pytest.warns(UserWarning, match="lm_head shared its weight with a layer that keeps the old one"):
        adapters.merge()
    torch.testing.assert_close(model(IDS), expected)
    assert torch.equal(model.embed.weight, embedding)


def test_an_adapted_model_can_be_copied_and_moved():
    model = Model()
    adapters, _ = learned(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS), model(IDS))
    model.to(torch.float64)
    adapters.step()
    torch.testing.assert_close(model(IDS), other(IDS).double(), rtol=1e-4, atol=1e-4)
