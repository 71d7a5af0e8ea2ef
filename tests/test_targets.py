"""apply_lora: which layers get an adapter and a method, what is left alone, and what is refused as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, apply_lora
from tests._models import ALL, IDS, Model, trained


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
        (Model, FixedRank(), None, {}, "has no adapters to adopt; name layers"),
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
            "matches self_attn.out_proj, whose weight MultiheadAttention reads without calling the layer",
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
