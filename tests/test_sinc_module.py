"""SincLoRALinear and SincUpdate: LoRA at the start, merge, exports, checkpoints, shared coefficients, stable ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrlora_ops import (
    Adapters,
    SincLoRALinear,
    SincUpdate,
    VariableRankLoRALinear,
    apply_lora,
    load_adapter,
)
from lrlora_ops.doctor import examine
from lrlora_ops.integrations._factors import all_factors


class Blocks(nn.Module):
    """Two layers of two projections each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).tanh())
        return x


def made(method: SincUpdate | None = None, **options) -> tuple[Blocks, Adapters]:
    torch.manual_seed(0)
    model = Blocks()
    return model, apply_lora(model, method or SincUpdate(3, num_coefficients=5, grid=0.05), "all-linear", **options)


def train(model: nn.Module, adapters: Adapters, steps: int = 4, optimizer=None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(adapters.parameters(), lr=0.02, weight_decay=0)
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        (model(x) - x.flip(1)).square().mean().backward()
        adapters.step()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trained(method: SincUpdate | None = None) -> tuple[Blocks, Adapters]:
    model, adapters = made(method)
    train(model, adapters)
    return model, adapters


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_new_adapter_is_lora_and_changes_nothing(dtype):
    torch.manual_seed(0)
    base = nn.Linear(12, 20).to(dtype)
    plain, layer = copy.deepcopy(base), SincLoRALinear.from_linear(base, rank=3)
    x = X.to(dtype)
    torch.testing.assert_close(layer(x), plain(x))
    assert not layer.weight.requires_grad and layer.weight is base.weight
    assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.scaling == 2
    assert layer.grid == 0.1 / 12**0.5
    with torch.no_grad():
        layer.lora_B.normal_()
    lora = VariableRankLoRALinear.from_linear(plain, max_rank=3, rank=3)
    with torch.no_grad():
        lora.lora_A.copy_(layer.lora_A)
        lora.lora_B.copy_(layer.lora_B)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x), lora(x), rtol=tolerance, atol=tolerance)


def test_forward_is_the_formula_with_coefficients_in_units_of_the_grid():
    layer = SincLoRALinear(12, 20, rank=2, num_coefficients=3, grid=0.3, lora_alpha=3.0, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.coefficients.normal_()
    z = layer.lora_B.t() @ layer.lora_A
    c = layer.coefficients
    phi = z + 0.3 * sum(c[k + 1] * (torch.sinc(z / 0.3 - k) - float(k == 0)) for k in (-1, 0, 1))
    expected = F.linear(X.double(), layer.weight + 1.5 * phi, layer.bias)
    torch.testing.assert_close(layer(X.double()), expected)
    torch.testing.assert_close(layer.delta_weight(), 1.5 * phi)


def test_every_parameter_trains_and_lifts_the_rank():
    model, adapters = trained()
    assert [name.rpartition(".")[2] for name, _ in adapters.named_parameters()] == [
        "lora_A",
        "lora_B",
        "coefficients",
    ] * 4
    assert all(p.grad is None and p.any() for p in adapters.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(("weight", "bias")))
    layer = adapters.modules["layers.0.up"]
    assert torch.linalg.matrix_rank(layer.delta_weight(torch.float64)) == 12 > layer.max_rank


def test_merge():
    model, adapters = trained()
    expected = model(X)
    plain = adapters.merge()
    assert type(plain.layers[0]["up"]) is nn.Linear
    torch.testing.assert_close(plain(X), expected)


def test_unadapted_is_the_model_of_before():
    torch.manual_seed(0)
    before = Blocks()
    _, adapters = trained()
    assert torch.equal(adapters.unadapted()(X), before(X))


def test_formats_of_low_rank_updates_refuse():
    """What PEFT's, vLLM's and SGLang's formats are written from."""
    _, adapters = trained()
    with pytest.raises(ValueError, match=r"layers.0.up, a SincLoRALinear, has no counterpart in PEFT.*format='merged'"):
        all_factors(adapters, "PEFT")


@pytest.mark.parametrize("share", ["layer", "type", "global"])
def test_resumes_bit_for_bit(share, tmp_path):
    method = SincUpdate(3, num_coefficients=5, share=share)
    model, adapters = made(method)
    optimizer = train(model, adapters)
    adapters.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, adapters, optimizer=optimizer)

    torch.manual_seed(0)
    resumed = Blocks()
    again = load_adapter(resumed, tmp_path)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.02, weight_decay=0)
    optimizer.load_state_dict(state)
    train(resumed, again, optimizer=optimizer)
    assert torch.equal(resumed(X), model(X))
    _, of_another_grid = made(SincUpdate(3, num_coefficients=5, share=share, grid=0.5))
    with pytest.raises(ValueError, match="grid"):
        of_another_grid.load(tmp_path)


@pytest.mark.parametrize(("share", "distinct"), [("layer", 4), ("type", 2), ("global", 1)])
def test_shared_coefficients(share, distinct):
    model, adapters = made(SincUpdate(3, share=share))
    owners = {name: module.coefficients for name, module in adapters.modules.items()}
    assert len({id(c) for c in owners.values()}) == distinct
    assert (owners["layers.0.up"] is owners["layers.1.up"]) == (share != "layer")
    assert (owners["layers.0.up"] is owners["layers.0.down"]) == (share == "global")
    parameters = adapters.parameters()
    assert len(parameters) == len({id(p) for p in parameters}) == 8 + distinct
    copied = copy.deepcopy(model)
    assert len({id(m.coefficients) for m in copied.modules() if isinstance(m, SincLoRALinear)}) == distinct


def test_stable_rank():
    model, adapters = made(SincUpdate(6, grid=0.05))
    assert all(rank == 0 and rank.dtype == torch.float32 for rank in adapters.ranks().values())
    train(model, adapters)
    for name, rank in adapters.ranks().items():
        values = torch.linalg.svdvals(adapters.modules[name].delta_weight(torch.float64))
        assert abs(rank - values.square().sum() / values[0] ** 2) < 0.01 * rank


def test_stable_rank_is_warm_started():
    """Where two singular values are close, one call is not exact; the next ones come nearer."""
    layer = SincLoRALinear(64, 64, rank=64, dtype=torch.float64)
    values = torch.ones(64, dtype=torch.float64)
    values[0] = 1.01
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.diag(values))
    exact = (63 + 1.01**2) / 1.01**2
    errors = [abs(float(layer.stable_rank()) - exact) for _ in range(40)]
    assert errors[-1] < 0.05 * errors[0]


def test_summary_and_metrics(capsys):
    _, adapters = trained()
    stable = adapters.ranks()["layers.0.up"]
    assert f" {stable:.1f} " in adapters.summary()
    mean = sum(float(rank) for rank in adapters.ranks().values()) / 4
    assert adapters.metrics()["lrlora/stable_rank_mean"] == pytest.approx(mean, rel=0.01)


def test_doctor_finds_nothing_wrong():
    report = examine(made()[1], X)
    assert report.passed, report


def test_in_autocast_and_under_activation_checkpointing():
    model, adapters = trained()
    with torch.autocast("cpu", torch.bfloat16):
        y = model.layers[0]["up"](X)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model.layers[0]["up"](X), rtol=0.05, atol=0.05)
    expected = torch.autograd.grad(model(X).sum(), adapters.parameters())
    actual = torch.autograd.grad(checkpoint(model, X, use_reentrant=False).sum(), adapters.parameters())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_model_in_half_precision():
    """Also where the coefficients went with it."""
    model, _ = trained()
    y = model.to(torch.bfloat16)(X.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_layers_that_are_not_plain_are_refused():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no plain nn\.Linear"):
        apply_lora(nn.Sequential(layer), SincUpdate(), "all-linear")
    assert layer.weight.requires_grad
