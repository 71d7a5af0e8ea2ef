"""SincUpdate on the experts of tiny random transformers models: training, merge, exports, checkpoints, ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from lrlora_ops import (
    Adapters,
    DynamicRank,
    FixedRank,
    SincLoRAExperts,
    SincLoRALinear,
    SincUpdate,
    VariableRankLoRALinear,
    apply_lora,
    load_adapter,
)
from lrlora_ops.doctor import examine
from lrlora_ops.integrations._factors import all_factors
from lrlora_ops.modules._sinc import SincPool
from tests._moe import MODELS, NUM_EXPERTS, ids, output, tiny

METHOD = SincUpdate(2, num_coefficients=5, grid=0.2)
# A model for each thing that experts can have; the others are the slow tier's.
FEW = ("mixtral", "gpt_oss", "muse_spark_text", "nemotron_h")
each_kind = pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
COMPUTES_IN_FP32 = {"nemotron_h", "openai_privacy_filter"}  # between their products, whatever their dtype


@torch.no_grad()
def fill(adapters: Adapters) -> None:
    """Updates of the size of the weights, which phi bends."""
    torch.manual_seed(1)
    for module in adapters.modules.values():
        for pool in module.pools().values():
            pool.lora_B.normal_(std=0.5)
            pool.coefficients.normal_()


def adapted(model: nn.Module, method: SincUpdate = METHOD, targets: str | list[str] = "experts") -> Adapters:
    torch.manual_seed(3)
    adapters = apply_lora(model, method, targets, dtype=next(model.parameters()).dtype)
    fill(adapters)
    return adapters


def update(pool: SincPool, own: slice, scaling: float) -> Tensor:
    """By the formula."""
    z = pool.lora_B[own].t() @ pool.lora_A[own]
    phi, reach = z, len(pool.coefficients) // 2
    for k in range(-reach, reach + 1):
        phi = phi + pool.grid * pool.coefficients[k + reach] * (torch.sinc(z / pool.grid - k) - float(k == 0))
    return scaling * phi


def moved_weights(plain: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """Each adapted weight with its update, by its name, differentiable by the adapters' parameters."""
    weights = {}
    for name, module in adapters.modules.items():
        for projection, pool in module.pools().items():
            key, rank = f"{name}.{projection or 'weight'}", module.max_rank
            owners = [slice(e * rank, (e + 1) * rank) for e in range(module.table.num_experts)]
            updates = torch.stack([update(pool, own, module.scaling) for own in owners])
            if projection and plain.get_submodule(name).is_transposed:
                updates = updates.mT
            weights[key] = plain.get_parameter(key) + (updates if projection else updates[0])
    return weights


class Moved(nn.Module):
    """The plain model, in its own loop over the experts, with weights that are functions of the adapters."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain.eval()
        self.plain.set_experts_implementation("eager")

    def forward(self, x: Tensor) -> Tensor:
        return output(self.plain, x)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the norm."""
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@each_kind
def test_forward_gradients_and_merge(name):
    """In fp64, against autograd through the model's own loop over experts whose weights are moved by the formula."""
    plain = tiny(name, torch.float64)
    model, x = copy.deepcopy(plain), ids(2)
    adapters = adapted(model, targets=["experts", "all-linear"])
    assert {type(m) for m in adapters.modules.values()} == {SincLoRAExperts, SincLoRALinear}
    reference = Moved(plain)
    with torch.no_grad():
        before = output(plain, x)
    y = output(model, x)
    moved = {f"plain.{key}": weight for key, weight in moved_weights(plain, adapters).items()}
    expected = torch.func.functional_call(reference, moved, (x,))
    assert (y - before).norm() > 0.1 * before.norm(), "the adapters do nothing"
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    grads, wanted = (torch.autograd.grad(out, adapters.parameters(), dy) for out in (y, expected))
    # A model that rounds to fp32 on the way leaves some hundred units of that in the five sums of a phi's gradient,
    # whose terms cancel.
    tolerance = 2e-5 if name in COMPUTES_IN_FP32 else 1e-11
    close(y, expected, tolerance)
    for grad, exact in zip(grads, wanted, strict=True):
        close(grad, exact, tolerance)
    if name in COMPUTES_IN_FP32:
        model.float()  # which is what a merge of it can be checked to
    with torch.no_grad():
        merged = adapters.merge()
        merged.set_experts_implementation("eager")  # of fp64, too
        close(output(merged, x), expected, tolerance)
    assert set(merged.state_dict()) == set(plain.state_dict())


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=ids(2), labels=ids(2)).loss


def train(model: nn.Module, adapters: Adapters, optimizer=None, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(adapters.parameters(), lr=0.02, weight_decay=0)
    for _ in range(steps):
        loss_of(model).backward()
        adapters.step()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return tiny("mixtral")


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def test_it_starts_as_the_model_and_every_parameter_trains(mixtral):
    model = copied(mixtral).train()
    adapters = apply_lora(model, SincUpdate(2, num_coefficients=3), "experts")
    torch.testing.assert_close(output(model, ids()), output(mixtral, ids()))
    name = "model.layers.0.mlp.experts"
    own = [key.removeprefix(f"{name}.") for key, _ in adapters.named_parameters() if key.startswith(name)]
    assert own == [f"{p}.{t}" for p in ("gate_up_proj", "down_proj") for t in ("lora_A", "lora_B", "coefficients")]
    module = adapters.modules[name]
    assert module.gate_up_proj.lora_A.shape == (2 * NUM_EXPERTS, 16)
    assert (module.gate_up_proj.grid, module.down_proj.grid) == (0.1 / 16**0.5, 0.1 / 24**0.5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        key.replace("experts.", "experts.lrlora.") for key, _ in adapters.named_parameters()
    }
    before = [p.detach().clone() for p in adapters.parameters()]
    loss_of(model).backward()
    assert module.table.row_counts.sum() == 2 * ids(2).numel() - 2 * 2  # the last position of a text has no label
    adapters.model.zero_grad()
    train(model, adapters, steps=3)
    assert all(not torch.equal(old, new) for old, new in zip(before, adapters.parameters(), strict=True))


def test_methods_for_experts_and_for_linear_layers(mixtral):
    adapters = apply_lora(copied(mixtral), {"experts": METHOD, "all-linear": FixedRank(2)})
    assert {type(m) for m in adapters.modules.values()} == {SincLoRAExperts, VariableRankLoRALinear}
    assert adapters.policies[0].budget == 2 * 2 * NUM_EXPERTS


@pytest.mark.parametrize(("share", "distinct"), [("layer", 4), ("type", 2), ("global", 1)])
def test_shared_coefficients(share, distinct, mixtral):
    adapters = apply_lora(copied(mixtral), SincUpdate(2, share=share), "experts")
    pools = [pool for module in adapters.modules.values() for pool in module.pools().values()]
    assert len({id(pool.coefficients) for pool in pools}) == distinct
    assert (pools[0].coefficients is pools[2].coefficients) == (share != "layer")
    assert (pools[0].coefficients is pools[1].coefficients) == (share == "global")
    assert len(adapters.parameters()) == 8 + distinct


@pytest.mark.parametrize("share", ["layer", "global"])
def test_resumes_bit_for_bit(share, tmp_path, mixtral):
    model = copied(mixtral)
    adapters = adapted(model, SincUpdate(2, num_coefficients=5, grid=0.2, share=share))
    optimizer = train(model, adapters)
    adapters.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, adapters, optimizer)

    resumed = copied(mixtral)
    again = load_adapter(resumed, tmp_path)
    assert len(again.parameters()) == len(adapters.parameters())
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.02, weight_decay=0)
    optimizer.load_state_dict(state)
    train(resumed, again, optimizer)
    assert torch.equal(output(resumed, ids()), output(model, ids()))
    with pytest.raises(ValueError, match="grid"):
        adapted(copied(mixtral), SincUpdate(2, num_coefficients=5, grid=0.3, share=share)).load(tmp_path)


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_merged_export(name, tmp_path):
    """Of transposed weights with biases, in bf16, as they are served."""
    pytest.importorskip("accelerate")
    model = tiny(name, torch.bfloat16)
    adapters = adapted(model)
    assert adapters.export(tmp_path / "model", "merged") < 0.02
    served = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    moved = output(model, ids())
    close(output(served, ids()), moved, 0.02)
    assert (output(adapters.unadapted(), ids()) - moved).norm() > 0.1 * moved.norm()


def test_formats_of_low_rank_updates_refuse(mixtral):
    with pytest.raises(ValueError, match=r"experts, a SincLoRAExperts, has no counterpart in PEFT.*format='merged'"):
        all_factors(adapted(copied(mixtral)), "PEFT")


def test_stable_ranks_of_each_expert(mixtral):
    adapters = apply_lora(copied(mixtral), METHOD, "experts")
    assert all(not ranks.any() and ranks.shape == (NUM_EXPERTS,) for ranks in adapters.ranks().values())
    fill(adapters)
    ranks = adapters.ranks()
    for name, module in adapters.modules.items():
        for expert in range(NUM_EXPERTS):
            exact = 0.0
            for projection in module.projections:
                values = torch.linalg.svdvals(module.delta_weight(projection, expert, torch.float64))
                exact += float(values.square().sum() / values[0] ** 2) / 2
            assert abs(float(ranks[name][expert]) - exact) < 0.02 * exact
    mean = float(torch.cat([*ranks.values()]).mean())
    assert adapters.metrics()["lrlora/stable_rank_mean"] == pytest.approx(mean, rel=0.01)
    name = "model.layers.0.mlp.experts"
    (line,) = (line for line in adapters.summary().splitlines() if line.startswith(f"{name}.down_proj"))
    assert float(line.split()[4]) == pytest.approx(float(ranks[name].sum()), rel=0.02)


def test_doctor(mixtral):
    adapters = adapted(copied(mixtral), targets=["experts", "all-linear"])
    report = examine(adapters, {"input_ids": ids()})
    assert report.passed, report


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, mixtral):
    """Not a bit differs, and what is routed is counted once."""
    results = []
    for checkpointing in (False, True):
        model = copied(mixtral).train()
        adapters = adapted(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        loss_of(model).backward()
        results.append([p.grad for p in adapters.parameters()] + [t.routed for t in adapters.tables.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast(mixtral):
    adapters = adapted(copied(mixtral))
    experts = adapters.model.get_submodule("model.layers.0.mlp.experts")
    hidden, index = torch.randn(6, 16), torch.arange(12).view(6, 2) % NUM_EXPERTS
    weights = torch.rand(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(hidden, index, weights)
    assert y.dtype == torch.bfloat16
    close(y, adapters.modules["model.layers.0.mlp.experts"].merge(experts)(hidden, index, weights), 0.02)
    y.float().square().sum().backward()
    own = [p.grad for n, p in adapters.named_parameters() if ".0." in n]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in own)


@pytest.mark.parametrize("rank", [2])
def test_from_experts_and_what_is_refused(rank, mixtral):
    experts = copied(mixtral).model.layers[0].mlp.experts
    adapter = SincLoRAExperts.from_experts(experts, rank=rank)
    assert experts.lrlora is adapter and not experts.down_proj.requires_grad
    with pytest.raises(ValueError, match="have an adapter already"):
        SincLoRAExperts.from_experts(experts)
    model = copied(mixtral)
    with pytest.raises(ValueError, match=r"mlp\.experts: SincUpdate has no dropout"):
        apply_lora(model, METHOD, "experts", dropout=0.1)
    apply_lora(model, METHOD, "experts")
    for method, message in (
        (DynamicRank(2, 3, 4), "is a SincLoRAExperts, which DynamicRank cannot rule"),
        (SincUpdate(4), r"has \(rank, num_coefficients\) \(2, 5\), but the method \(4, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_lora(model, method)
    assert isinstance(apply_lora(model, METHOD).modules["model.layers.1.mlp.experts"], SincLoRAExperts)
