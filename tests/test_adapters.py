"""apply_lora and Adapters: which layers get an adapter, what is left alone, and a model that learns and is merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, apply_lora


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 20), "down": nn.Linear(20, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x).tanh() * self.k_proj(x)
        return x + self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    """Two blocks, with an embedding and a head that can be tied."""

    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(12, 30, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


BLOCK = ["q_proj", "k_proj", "mlp.up", "mlp.down"]
ALL = [f"layers.{i}.{name}" for i in range(2) for name in BLOCK]
IDS = torch.arange(24).view(3, 8)


def trained(model: nn.Module) -> nn.Module:
    """Adapters that do something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, VariableRankLoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def learn(model: nn.Module, adapters, steps: int, optimizer: torch.optim.Optimizer, seed: int = 2) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(30, (4, 8), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (7 * ids + 3).flatten() % 30)
        optimizer.zero_grad()
        loss.backward()
        adapters.step()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        ("q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        ("layers.1.*", [name for name in ALL if "1" in name]),
        ("*.mlp.*", [name for name in ALL if "mlp" in name]),
        ("mlp.*", [name for name in ALL if "mlp" in name]),
        ("layers.0.mlp.up", ["layers.0.mlp.up"]),
        (["q_proj", "mlp.up"], [name for name in ALL if name.endswith(("q_proj", "up"))]),
        (["all-linear", "lm_head"], [*ALL, "lm_head"]),
        (["q_proj", "layers.0.*"], [name for name in ALL if "0" in name or "q_" in name]),
        ("layers.[0].?_proj", ["layers.0.q_proj", "layers.0.k_proj"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_targets(targets, expected, tied):
    """Frozen but for the adapters, and not a bit changed."""
    model = Model(tied)
    before = model(IDS)
    adapters = apply_lora(model, FixedRank(3), targets)
    assert sorted(adapters.modules) == sorted(expected)
    found = {name for name, m in model.named_modules() if isinstance(m, VariableRankLoRALinear)}
    assert found == set(expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in expected for part in ("lora_A", "lora_B")}
    assert trainable == {name for name, _ in adapters.named_parameters()}
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert torch.equal(model(IDS), before)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()


def test_the_head_of_a_wrapped_model_is_left_out_too():
    assert len(apply_lora(Wrapper(), FixedRank(2), "all-linear").modules) == len(ALL)


def test_settings_reach_the_adapters():
    model = Model()
    with torch.no_grad():
        model.to(torch.bfloat16)
    apply_lora(model, FixedRank(3), "q_proj", lora_alpha=9, dropout=0.25, dtype=torch.bfloat16)
    adapter = model.layers[0].q_proj
    assert (adapter.max_rank, int(adapter.rank), adapter.scaling, adapter.dropout) == (3, 3, 3, 0.25)
    assert adapter.lora_A.dtype == torch.bfloat16


def unchanged_error(model: nn.Module, method, targets, message: str, **options) -> None:
    """The call fails, and the model is what it was: its modules, values and what is trainable."""
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    state, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    tables = [m for m in model.modules() if isinstance(m, VariableRankLoRALinear)]
    train = [(m.table.train_ranks.clone(), m.table.gate.detach().clone()) for m in tables]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        apply_lora(model, method, targets, **options)
    assert modules == [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    assert trainable == [p.requires_grad for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for module, (ranks, gate) in zip(tables, train, strict=True):
        assert torch.equal(module.table.train_ranks, ranks) and torch.equal(module.table.gate, gate)


class OddOneOut(nn.Module):
    """Its second layer says sizes that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.in_features = -1


@pytest.mark.parametrize(
    ("make", "method", "targets", "options", "message"),
    [
        (Model, FixedRank(), "v_proj", {}, "target 'v_proj' matches no linear layer.*layers.0.q_proj.*and 4 more"),
        (Model, FixedRank(), ["q_proj", "nothing"], {}, "target 'nothing' matches no linear layer"),
        (Model, FixedRank(), "embed", {}, r"it matches embed \(Embedding\)"),
        (Model, FixedRank(), "mlp", {}, r"it matches layers.0.mlp \(ModuleDict\)"),
        (Model, FixedRank(), [], {}, "targets is empty"),
        (Model, FixedRank(), None, {}, "has no VariableRankLoRALinear to adopt; name layers"),
        (Model, {}, None, {}, "targets is empty"),
        (Model, {"q_proj": FixedRank()}, "all-linear", {}, "layers.0.k_proj is a target, but no method's pattern"),
        (Model, {"*": FixedRank(), "q_proj": FixedRank(2)}, "all-linear", {}, "the method for 'q_proj' matches no"),
        (Model, FixedRank, "all-linear", {}, r"method is <class .*FixedRank'>; it must be the settings of one"),
        (Model, "learned", "all-linear", {}, "method is 'learned'; it must be the settings of one"),
        (Model, {"q_proj": 8}, None, {}, "method is 8; it must be the settings"),
        (Model, FixedRank(), "all-linear", {"dropout": 1.5}, "layers.0.q_proj: dropout is 1.5"),
        (lambda: nn.Linear(3, 3), FixedRank(), "all-linear", {}, "the model is itself a Linear"),
        (lambda: VariableRankLoRALinear(3, 3), FixedRank(), None, {}, "itself a VariableRankLoRALinear"),
        (lambda: nn.Sequential(nn.ReLU()), FixedRank(), "all-linear", {}, "the linear layers are none"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16),
            FixedRank(),
            "self_attn.*",
            {},
            "matches self_attn.out_proj, whose weight nn.MultiheadAttention reads",
        ),
    ],
)
def test_what_fails_changes_nothing(make, method, targets, options, message):
    unchanged_error(make(), method, targets, message, **options)


def test_a_failure_in_the_middle_changes_nothing():
    model = OddOneOut()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError):
        apply_lora(model, FixedRank(2), "all-linear")
    assert type(model.first) is nn.Linear and trainable == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["mlp.*"], ["layers.1.*"]])
def test_applying_twice_is_an_error(targets):
    """Another call would freeze the adapters of the first."""
    model = Model()
    apply_lora(model, FixedRank(3), "q_proj")
    unchanged_error(model, FixedRank(2), targets, "the model has adapters already: layers.0.q_proj.*adopt.*merge")


def test_a_shared_layer_gets_one_adapter_everywhere():
    """Under several names, in one parent or in two; any of the names finds it."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)
            self.block = nn.Sequential(self.first, nn.Linear(4, 4), self.first)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x)) + self.second(x)

    for target in ("first", "second", "block.2", ["first", "second", "block.0"]):
        model = Shared()
        adapters = apply_lora(model, FixedRank(2), target)
        assert len(adapters.modules) == 1 and len(adapters.parameters()) == 2
        (adapter,) = adapters.modules.values()
        assert adapter is model.first is model.second is model.block[0] is model.block[2]
        assert type(model.block[1]) is nn.Linear
        x = torch.randn(2, 4)
        expected = trained(model)(x)
        torch.testing.assert_close(adapters.merge()(x), expected)
        assert type(model.first) is nn.Linear and model.first is model.second is model.block[0] is model.block[2]


def test_a_method_for_each_pattern():
    """The first pattern that matches wins; without targets the patterns are the targets."""
    methods = {"q_proj": FixedRank(5), "mlp.*": LearnedRank(2, 4, total_steps=10), "layers.*": FixedRank(1)}
    for targets in (None, "all-linear", ["layers.*"]):
        adapters = apply_lora(Model(), methods, targets)
        held = {name.split(".", 2)[2]: adapter.max_rank for name, adapter in adapters.modules.items()}
        assert held == {"q_proj": 5, "mlp.up": 4, "mlp.down": 4, "k_proj": 1}
        assert sum(int(rank) for name, rank in adapters.ranks().items() if "mlp" in name) == 8
    apply_lora(Model(), {"q_proj": FixedRank(5), "all-linear": FixedRank(1)})


class Custom(nn.Module):
    """A model of one's own, with the modules in place."""

    def __init__(self, max_rank: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.up = VariableRankLoRALinear(12, 20, max_rank=max_rank, rank=2)
        self.down = VariableRankLoRALinear(20, 12, max_rank=max_rank, rank=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.embed(x)).relu())


@pytest.mark.parametrize(
    "method", [FixedRank(4), {"up": FixedRank(4), "*": FixedRank(4)}, LearnedRank(4, 8, total_steps=5)], ids=str
)
def test_adopting_sets_the_ranks_and_freezes_nothing(method):
    model = trained(Custom())
    adapters = apply_lora(model, method)
    assert adapters.modules == {"up": model.up, "down": model.down}
    assert {name: int(rank) for name, rank in adapters.ranks().items()} == {"up": 4, "down": 4}
    assert model.embed.weight.requires_grad
    assert not model.up.lora_B[2:4].any() and model.down.lora_B[:4].all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FixedRank(9), "up has max_rank 8, but the method needs 9; make the layer larger with resize"),
        (LearnedRank(4, 16), "up has max_rank 8, but LearnedRank has 16; make them equal"),
        (LearnedRank(4, 4), "up has max_rank 8, but LearnedRank has 4"),
        ({"down": FixedRank(5), "up": LearnedRank(2, 16)}, "up has max_rank 8, but LearnedRank has 16"),
    ],
)
def test_adopting_what_does_not_fit_changes_nothing(method, message):
    unchanged_error(trained(Custom()), method, None, message)


def test_an_encoder_layer_does_not_pass_its_adapters_by():
    """In evaluation PyTorch fuses nn.TransformerEncoderLayer and reads its weights, unless it is told not to."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    plain = copy.deepcopy(encoder)
    adapters = apply_lora(encoder, FixedRank(2), "all-linear")
    assert sorted(adapters.modules) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    trained(encoder)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    for mask in (None, padding):
        expected = encoder.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            actual = encoder.eval()(x, src_key_padding_mask=mask)
        keep = ~padding if mask is not None else torch.ones(2, 3, dtype=torch.bool)
        torch.testing.assert_close(actual[keep], expected[keep])
        assert (actual - plain.train()(x, src_key_padding_mask=mask))[keep].abs().max() > 0.01


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
    assert rows["layers.1.q_proj"] == ["12", "12", "3", "5", "72", f"{5 * 24 * 4 / 1024:.1f}"]
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
