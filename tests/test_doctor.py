"""examine: each illness that it must find, what it must not call one, and that it leaves no trace."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrlora_ops import DynamicRank, FixedRank, LearnedRank, apply_lora
from lrlora_ops._coverage import kind_of
from lrlora_ops.doctor import examine
from tests._models import ALL, IDS, Model, trained

HEALTHY = [
    FixedRank(3),
    LearnedRank(1, 4, total_steps=10, seed=3),  # samples prefixes of 0 and gates of 0
    {"*.mlp.*": LearnedRank(2, 4), "all-linear": FixedRank(1)},
]


class Sick(Model):
    """The model, and one layer more whose adapter a test makes ill."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.extra, self.how = nn.Linear(12, 12), how
        if how == "scaled weight":
            self.extra.__class__ = ScaledLinear

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        if self.how == "detached":
            x = x + self.extra(x).detach()
        elif self.how == "no_grad":
            with torch.no_grad():
                y = self.extra(x)
            x = x + y
        elif self.how == "dropped":
            x = x + 0 * self.extra(x)
        elif self.how == "overflow":
            x = x + self.extra(x * torch.inf).nan_to_num(0.0)
        elif self.how != "unused":
            x = x + self.extra(x)
        return self.lm_head(x)


class ScaledLinear(nn.Linear):
    """Transforms its weight, so that an update added to it is transformed, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def sick(how: str = "", method=None):
    model = Sick(how)
    return apply_lora(model, method or FixedRank(3), "all-linear")


def failures(adapters) -> dict[str, str]:
    report = examine(adapters, IDS)
    failed = [finding for finding in report.findings if not finding.passed]
    assert report.passed == (not failed)
    assert all(finding.fix and f"FAIL  {finding.check}" in str(report) for finding in failed)
    return {finding.check: finding.detail for finding in failed}


CALLED, MOVES = "every adapter is called and gets gradient", "every adapter moves the output"
ACTS, MERGES, FINITE = "every adapter can act", "a merged layer computes what its adapter does", "all values are finite"


@pytest.mark.parametrize("method", HEALTHY)
def test_a_healthy_model_passes(method):
    adapters = apply_lora(Sick(), method, "all-linear")
    report = examine(adapters, IDS)
    assert report.passed, report
    counted = {finding.check for finding in report.findings if finding.detail == "9 adapters"}
    assert counted == {ACTS, CALLED, MOVES, MERGES}


@pytest.mark.parametrize(
    "how, words",
    [
        ("unused", "extra: never called by the forward"),
        ("detached", "extra: called, but no gradient comes back"),
        ("no_grad", "extra: called, but no gradient comes back"),
        ("dropped", "extra: called, but the gradient is 0"),
    ],
)
def test_an_adapter_that_would_not_train(how, words):
    found = failures(sick(how))
    assert found == {CALLED: words, MOVES: "extra do not"}


def test_a_gradient_that_is_cut_for_all():
    adapters = sick()
    adapters.model.forward = lambda ids: Sick.forward(adapters.model, ids).detach()
    found = failures(adapters)
    assert "layers.0.q_proj, layers.0.k_proj, layers.0.mlp.up and 6 more: called, but no gradient" in found[CALLED]


@pytest.mark.parametrize("closed", [1, 3])
def test_gate_of_0(closed):
    adapters = sick()
    with torch.no_grad():
        adapters.modules["extra"].table.gate[:closed] = 0
    found = failures(adapters)
    assert found.pop(ACTS) == f"extra: the gates of {closed} of 3 live components are 0, so that they add nothing"
    assert not adapters.modules["extra"].table.gate[:closed].any()


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda layer: setattr(layer, "scaling", 0.0), "extra: the scaling is 0"),
        (lambda layer: layer.lora_B.requires_grad_(False), "extra: parameters that do not require a gradient"),
        (lambda layer: layer.lora_A.data.zero_(), "extra: A and B are both 0, which no gradient can leave"),
    ],
)
def test_an_adapter_that_cannot_act(break_it, words):
    adapters = sick()
    break_it(adapters.modules["extra"])
    assert failures(adapters)[ACTS] == words


def test_a_merge_that_differs():
    found = failures(sick("scaled weight"))
    assert found.keys() == {MERGES}
    kinds = {row.kind for row in examine(sick("scaled weight"), IDS).coverage}
    assert "extra" in kinds and "extra.base_layer" not in kinds
    assert "extra: the merged layer differs from the adapter's forward" in found[MERGES]


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "weight"])
def test_a_nan_is_named_where_it_is(name):
    adapters = sick()
    with torch.no_grad():
        getattr(adapters.modules["extra"], name)[0, 0] = torch.nan
    where = "extra.weight" if name == "weight" else "extra"
    assert failures(adapters)[FINITE] == f"{where}: NaN or infinity in the weights"


def test_an_overflow_is_named_where_it_begins():
    assert failures(sick("overflow"))[FINITE] == "extra: NaN or infinity in the output, of finite weights"


def test_ranks_of_0():
    found = failures(sick(method=FixedRank(0)))
    assert found["there are ranks"] == "all 9 adapters have rank 0, so nothing trains"
    some = sick(method={"extra": FixedRank(0), "*": FixedRank(2)})
    report = examine(some, IDS)
    assert report.passed and "NOTE  rank 0 now: extra" in str(report)


def test_a_forward_that_raises():
    found = failures(apply_lora(nn.ModuleDict({"q": nn.Linear(3, 3)}), FixedRank(1), "q"))
    assert "missing the required" in found["forward and backward run in training mode"]
    assert found[CALLED] == "not known, for the batch did not run to its end" and MOVES in found


def test_adapters_that_are_merged_cannot_be_examined():
    adapters = sick()
    adapters.merge()
    with pytest.raises(ValueError, match="merged"):
        examine(adapters, IDS)


@pytest.mark.parametrize("method", HEALTHY)
def test_nothing_is_changed(method):
    """Not a bit of a parameter, buffer, gradient, statistic, mode or random number."""
    model = Sick()
    model.norm = nn.BatchNorm1d(8)
    model.register_forward_hook(lambda module, args, output: module.norm(output))
    adapters = apply_lora(model, method, "all-linear", dropout=0.3)
    trained(model)
    model(IDS).square().sum().backward()
    model.layers[0].eval()

    def state() -> list[Tensor]:
        tables = adapters.tables.values()
        tensors = [*model.state_dict().values(), *(p.grad for p in adapters.parameters())]
        tensors += [t for table in tables for t in (table.gate, table.train_ranks, table.sensitivity, table.routed)]
        return [*tensors, torch.get_rng_state()]

    held = [tensor.detach().clone() for tensor in state()]
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in adapters.parameters()]
    assert examine(adapters, IDS).passed
    assert all(torch.equal(old, new) for old, new in zip(held, state(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is old for p, old in zip(adapters.parameters(), gradients, strict=True))


def test_what_is_covered_and_why_not():
    adapters = apply_lora(Sick(), FixedRank(2), ["q_proj", "mlp.*"])
    rows = {row.kind: (row.layers, row.parameters, row.rank, row.reason) for row in examine(adapters, IDS).coverage}
    assert rows == {
        "layers.*.q_proj": (2, 2 * 144, 4, ""),
        "layers.*.mlp.up": (2, 2 * 240, 4, ""),
        "layers.*.mlp.down": (2, 2 * 240, 4, ""),
        "embed": (1, 360, None, "embedding"),
        "layers.*.k_proj": (2, 2 * 144, None, "targets do not name it"),
        "lm_head": (1, 360, None, "output embeddings, adapted if they are named"),
        "extra": (1, 144, None, "targets do not name it"),
    }


def test_layers_that_are_read_past():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "proj": nn.Linear(8, 8)})
    model.forward = lambda x: model["attention"](model["proj"](x), x, x)[0]
    report = examine(apply_lora(model, FixedRank(2), "all-linear"), torch.randn(3, 2, 8))
    assert report.passed, report
    reasons = {row.kind: row.reason for row in report.coverage}
    assert reasons["attention"] == "MultiheadAttention: not a linear layer"
    assert reasons["attention.out_proj"] == "MultiheadAttention reads its weight without calling it"


def test_a_kind_has_a_star_for_each_number():
    assert kind_of("model.layers.12.experts.3.up_proj2") == "model.layers.*.experts.*.up_proj2"
    assert kind_of("0") == kind_of("11") == "*"


def test_experts():
    pytest.importorskip("transformers")
    from tests._cli import qwen3_moe

    model = qwen3_moe()
    adapters = apply_lora(model, {"experts": DynamicRank(2, 4, 8), "*.self_attn.*": FixedRank(2)})
    report = examine(adapters, {"input_ids": IDS[:1, :2]})  # two tokens, two of four experts each
    assert report.passed, report
    assert re.search(r"NOTE  [1-4] of 8 experts got no row of this batch", str(report))
    assert {row.kind: row.rank for row in report.coverage}["model.layers.*.mlp.experts"] == 16
    rest = examine(apply_lora(qwen3_moe(), FixedRank(1), "q_proj"), {"input_ids": IDS})
    reasons = {row.kind: row.reason for row in rest.coverage}
    assert reasons["model.layers.*.mlp.experts"] == "experts: targets do not name them"
    assert reasons["model.layers.*.mlp.gate"] == "Qwen3MoeTopKRouter: not a linear layer"


def test_sizes_of_updates_do_not_hide_a_small_adapter():
    """However small an adapter's scaling is, its gradient counts."""
    adapters = sick()
    adapters.modules["extra"].scaling = 1e-6
    assert not failures(adapters)
    assert len(adapters.modules) == len(ALL) + 1
