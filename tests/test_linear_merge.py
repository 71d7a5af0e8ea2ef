"""VariableRankLoRALinear.merge: the same output from a plain layer, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lrlora_ops import VariableRankLoRALinear
from tests._layers import BASES, DTYPES, Quantised, hooked, layer, linear, opaque

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("training", [True, False])
def test_merge_of_a_plain_layer(training, dtype):
    adapter = layer(max_rank=8, rank=5, dtype=dtype, dropout=0.5).train(training)
    merged = adapter.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype and merged.training == training
    assert not any(p.requires_grad for p in merged.parameters())
    assert adapter.training == training and merged.weight is not adapter.weight
    exact = adapter.weight.double() + 2 * adapter.lora_B[:5].double().t() @ adapter.lora_A[:5].double()
    torch.testing.assert_close(merged.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("adapters", DTYPES, ids=str)
@each_dtype
def test_merge_across_dtypes(dtype, adapters):
    adapter = VariableRankLoRALinear.from_linear(linear().to(dtype), dtype=adapters)
    nn.init.normal_(adapter.lora_B)
    merged = adapter.merge()
    assert merged.weight.dtype == dtype


@pytest.mark.parametrize("name", ["hook", "own forward", "subclass", "custom"])
def test_merge_of_a_wrapped_layer(name):
    """A copy of the layer, with the update in its weight; the adapter still works, in the modes it was in."""
    base = BASES[name]()
    adapter = VariableRankLoRALinear.from_linear(base)
    nn.init.normal_(adapter.lora_B)
    if name == "hook":
        with torch.no_grad():
            adapter.lora_B.zero_()  # a hook doubles the output of the base alone: nothing else can be merged
    if name == "custom":
        base.train()
    before = base.weight.clone()
    modes = [m.training for m in adapter.modules()]
    merged = adapter.merge()
    assert type(merged) is type(base) and merged is not base and torch.equal(base.weight, before)
    assert modes == [m.training for m in adapter.modules()]
    assert [m.training for m in merged.modules()] == [m.training for m in base.modules()]
    x = torch.randn(5, 8)
    torch.testing.assert_close(merged.eval()(x), adapter.eval()(x))


def test_merge_survives_cancellation():
    """The update takes the weight to zero: what is left is rounding, and no reason to refuse."""
    adapter = layer(16, 16, bias=False, max_rank=16, rank=16, dtype=torch.bfloat16)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(16))
        adapter.lora_B.copy_(-adapter.weight.t() / 2)
    assert not adapter.merge().weight.any()


def shared_forward() -> nn.Linear:
    """The forward of a copy is still the original's, and so would not see a merged weight."""
    made = linear()
    original = made.forward
    made.forward = lambda x: original(x)
    return made


def spoil_with_nan(adapter: VariableRankLoRALinear) -> None:
    nn.init.constant_(adapter.lora_A, torch.nan)


@pytest.mark.parametrize(
    ("make", "spoil", "error", "message"),
    [
        (linear, spoil_with_nan, RuntimeError, "the merged layer differs.*Is there a NaN in it"),
        (hooked, lambda adapter: None, RuntimeError, "the merged layer differs"),
        (shared_forward, lambda adapter: None, RuntimeError, "the merged layer differs"),
        (lambda: parametrizations.spectral_norm(linear()), lambda adapter: None, RuntimeError, "transform its weight"),
        (
            lambda: Quantised(8, 6),
            lambda adapter: None,
            ValueError,
            r"no plain floating-point weight of shape \(6, 8\)",
        ),
        (opaque, lambda adapter: None, ValueError, "no plain floating-point weight"),
        (lambda: nn.Linear(8, 6, dtype=torch.float8_e4m3fn, device="meta"), lambda _: None, ValueError, "no plain"),
    ],
    ids=["nan", "hook", "shared forward", "spectral norm", "quantised", "tensor subclass", "fp8"],
)
def test_merge_refuses_what_would_be_wrong(make, spoil, error, message):
    adapter = VariableRankLoRALinear.from_linear(make())
    nn.init.normal_(adapter.lora_B)
    spoil(adapter)
    with pytest.raises(error, match=f"(?s){message}"):
        adapter.merge()


def test_merge_of_a_weight_norm_layer():
    """A parametrization that can be set is merged through its inverse, and checked like any other."""
    adapter = VariableRankLoRALinear.from_linear(parametrizations.weight_norm(linear()))
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(3, 8)
    torch.testing.assert_close(adapter.merge()(x), adapter(x))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_merge_at_a_lower_matmul_precision(precision):
    """TF32 and bf16 products round more, on request; that is no reason to refuse."""
    torch.set_float32_matmul_precision(precision)
    try:
        layer(512, 256).merge()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_merge_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert layer().merge().weight.dtype == torch.float32
