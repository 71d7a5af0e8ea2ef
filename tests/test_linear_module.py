"""VariableRankLoRALinear: any base layer, ranks that move without moving the output, and state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrlora_ops import VariableRankLoRALinear
from tests._layers import BASES, DTYPES, layer, linear

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_a_new_adapter_changes_nothing():
    base = linear()
    x = torch.randn(3, 8)
    expected = base(x)
    adapter = VariableRankLoRALinear.from_linear(base)
    assert torch.equal(adapter(x), expected)
    assert torch.equal(adapter.eval()(x), expected)


def test_a_plain_linear_hands_over_its_parameters():
    base = linear()
    adapter = VariableRankLoRALinear.from_linear(base, max_rank=4, rank=2)
    assert adapter.weight is base.weight and adapter.bias is base.bias and adapter.base_layer is None
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    state = adapter.state_dict()
    assert set(state) == {"weight", "bias", "lora_A", "lora_B", "table.components", "table.ranks"}
    missing, unexpected = adapter.load_state_dict(linear().state_dict(), strict=False)
    assert not unexpected and "weight" not in missing
    assert "in_features=8, out_features=6, max_rank=4" in repr(adapter)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
def test_any_other_layer_is_called(make):
    """Its forward counts, in both modes; x gets the gradient of both branches, and the base none."""
    base = make()
    adapter = VariableRankLoRALinear.from_linear(base, max_rank=4, rank=3)
    nn.init.normal_(adapter.lora_B)
    assert adapter.base_layer is base and adapter.weight is None
    assert not any(p.requires_grad for p in base.parameters())
    x = torch.randn(3, 8, requires_grad=True)
    for mode in (True, False):
        adapter.train(mode)
        base.eval()
        y = adapter(x)
        expected = base(x) + 2 * (x @ adapter.lora_A[:3].t()) @ adapter.lora_B[:3]
        torch.testing.assert_close(y, expected)
    leaves = (x, adapter.lora_A, adapter.lora_B)
    for one, other in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@each_dtype
@pytest.mark.parametrize("adapters", [None, torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_of_layer_and_adapter(dtype, adapters):
    """In training too, where the gate takes part; the adapter is fp32 unless asked otherwise, fp64 for fp64."""
    adapter = VariableRankLoRALinear.from_linear(linear().to(dtype), dtype=adapters)
    default = torch.float64 if dtype == torch.float64 else torch.float32
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == (adapters or default)
    nn.init.normal_(adapter.lora_B)
    y = adapter(torch.randn(3, 8, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert adapter.lora_A.grad.any() and adapter.sensitivity[:8].all() and not adapter.sensitivity[8:].any()


def test_a_failed_wrap_leaves_the_layer_trainable():
    base = linear()
    with pytest.raises(ValueError):
        VariableRankLoRALinear.from_linear(base, max_rank=2, rank=3)
    assert base.weight.requires_grad and base.bias.requires_grad


def test_unfreezing_the_weight_is_an_error_not_a_zero_gradient():
    adapter = layer()
    adapter.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"weight requires a gradient.*weight.requires_grad_\(False\)"):
        adapter(torch.randn(2, 37))


@each_dtype
@pytest.mark.parametrize("training", [True, False])
def test_growth_leaves_the_output_bit_identical(training, dtype):
    """Through every rank up to the most, also after shrinking: what is dropped does not come back."""
    adapter = layer(max_rank=140, rank=0, dtype=dtype).train(training)
    x = torch.randn(5, 37, dtype=dtype)
    for rank in [*range(0, 35), 63, 64, 65, 127, 128, 129, 140]:
        before = adapter(x)
        adapter.set_rank(rank)
        assert int(adapter.rank) == rank
        assert torch.equal(adapter(x), before)
        with torch.no_grad():
            adapter.lora_B[:rank].normal_(std=0.3)
    adapter.set_rank(5)
    before = adapter(x)
    adapter.set_rank(100)
    assert torch.equal(adapter(x), before)
    assert not adapter.lora_B[5:100].any() and adapter.lora_B[100:].any()


def test_set_rank_moves_no_memory():
    adapter = layer(max_rank=8, rank=2)
    tensors = [adapter.lora_A, adapter.lora_B, adapter.table.ranks, adapter.table.train_ranks, adapter.table.gate]
    pointers = [t.data_ptr() for t in tensors]
    adapter.set_rank(7)
    held = [adapter.lora_A, adapter.lora_B, adapter.table.ranks, adapter.table.train_ranks, adapter.table.gate]
    assert all(a is b for a, b in zip(tensors, held, strict=True))
    assert pointers == [t.data_ptr() for t in held]


def test_training_follows_the_sampled_prefix_and_evaluation_the_rank():
    adapter = layer(max_rank=8, rank=4)
    x = torch.randn(3, 37)

    def expected(rank: int) -> Tensor:
        update = (x @ adapter.lora_A[:rank].t()) @ adapter.lora_B[:rank]
        return F.linear(x, adapter.weight, adapter.bias) + 2 * update

    with torch.no_grad():
        adapter.table.train_ranks.fill_(7)
        adapter.table.gate[6] = 0
    torch.testing.assert_close(adapter(x), expected(6))
    adapter(x).sum().backward()
    assert adapter.sensitivity[6] != 0 and adapter.sensitivity[7] == 0
    assert not adapter.lora_A.grad[6:].any() and not adapter.lora_B.grad[6:].any()
    torch.testing.assert_close(adapter.eval()(x), expected(4))
    adapter.train().table.reset_training_state()
    torch.testing.assert_close(adapter(x), expected(4))


def test_dropout_acts_in_training_alone():
    adapter = layer(dropout=0.5)
    x = torch.randn(4, 37)
    assert not torch.equal(adapter(x), adapter(x))
    torch.manual_seed(5)
    first = adapter(x)
    torch.manual_seed(5)
    assert torch.equal(adapter(x), first)
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_scaling_does_not_depend_on_the_rank():
    assert layer(max_rank=32, rank=3).scaling == 2
    assert layer(max_rank=32, rank=3, lora_alpha=16).scaling == 0.5
    assert layer(max_rank=0, rank=0).scaling == 0


@each_dtype
def test_delta_weight_is_what_forward_adds(dtype):
    adapter = layer(max_rank=8, rank=5, dtype=dtype).eval()
    with torch.no_grad():
        adapter.lora_B[5:] = torch.nan
    delta = adapter.delta_weight()
    assert delta.shape == (19, 37) and delta.dtype == torch.promote_types(dtype, torch.float32)
    a, b = adapter.lora_A[:5].double(), adapter.lora_B[:5].double()
    torch.testing.assert_close(delta.double(), 2 * b.t() @ a, rtol=1e-5, atol=1e-6)
    assert not delta.requires_grad
    assert not layer(max_rank=0, rank=0).delta_weight().any()


@pytest.mark.parametrize("ranks", [(8, 3), (3, 8), (0, 8), (8, 0)])
def test_a_state_dict_loads_into_another_rank(ranks):
    """The rank comes with it, in training as well, whatever was sampled before."""
    saved, other = (layer(max_rank=8, rank=rank) for rank in ranks)
    with torch.no_grad():
        other.lora_B.zero_()
        other.table.train_ranks.fill_(1)
        other.table.gate[0] = 0
    other.load_state_dict(saved.state_dict())
    x = torch.randn(3, 37)
    assert int(other.rank) == ranks[0]
    assert torch.equal(other(x), saved(x))
    assert torch.equal(other.eval()(x), saved.eval()(x))


def by_torch_save(adapter: VariableRankLoRALinear) -> VariableRankLoRALinear:
    file = io.BytesIO()
    torch.save(adapter, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda adapter: pickle.loads(pickle.dumps(adapter)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_are_equal_and_independent(copied):
    """After a backward pass, in the middle of a step."""
    adapter = layer(max_rank=8, rank=4)
    x = torch.randn(3, 37)
    with torch.no_grad():
        adapter.table.train_ranks.fill_(6)
        adapter.table.gate[5] = 0
    adapter(x).sum().backward()
    other = copied(adapter)
    assert torch.equal(other(x), adapter(x))
    assert torch.equal(other.eval()(x), adapter.eval()(x))
    other.train().set_rank(1)
    nn.init.zeros_(other.lora_A)
    assert int(adapter.rank) == 4 and adapter.lora_A.any()
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other(x), adapter.eval()(x))
    other(x).sum().backward()
    assert other.sensitivity[:4].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_another_dtype(dtype):
    adapter = layer().to(dtype)
    y = adapter(torch.randn(2, 37, dtype=dtype))
    y.sum().backward()
    assert y.dtype == adapter.lora_A.grad.dtype == dtype
    assert adapter.table.ranks.dtype == torch.int32 and adapter.sensitivity.any()
    back = adapter.to(torch.float32)
    back(torch.randn(2, 37)).sum().backward()


@pytest.mark.parametrize("how", ["to_empty", "assign", "built on meta"])
def test_through_the_meta_device(how):
    """A large model is built or sent there first, and filled afterwards; it then trains like the original."""
    original = layer(max_rank=8, rank=4)
    if how == "to_empty":
        adapter = copy.deepcopy(original).to("meta").to_empty(device="cpu")
        adapter.load_state_dict(original.state_dict())
    else:
        with torch.device("meta"):
            adapter = VariableRankLoRALinear(37, 19, max_rank=8, rank=2)
        assert adapter(torch.randn(2, 37, device="meta")).shape == (2, 19)
        if how == "assign":
            adapter.load_state_dict(copy.deepcopy(original.state_dict()), assign=True)
        else:
            adapter.to_empty(device="cpu").load_state_dict(original.state_dict())
    x = torch.randn(3, 37)
    for a in (adapter, original):
        a(x).sum().backward()
    assert torch.equal(adapter(x), original(x))
    assert torch.equal(adapter.sensitivity, original.sensitivity)


@pytest.mark.parametrize("size", [4, 6, 8, 20])
def test_resize_keeps_output_and_identity(size):
    adapter = layer(max_rank=8, rank=4)
    lora_A, lora_B, scaling = adapter.lora_A, adapter.lora_B, adapter.scaling
    x = torch.randn(3, 37)
    adapter(x).sum().backward()
    before = adapter.eval()(x)
    adapter.resize(size)
    assert adapter.max_rank == size and adapter.scaling == scaling
    assert adapter.lora_A is lora_A and adapter.lora_B is lora_B and lora_A.grad is None
    torch.testing.assert_close(adapter(x), before)
    adapter.train().set_rank(size)
    torch.testing.assert_close(adapter(x), before if size > 8 else adapter.eval()(x))
    adapter.train()(x).sum().backward()
    assert lora_A.grad.shape == (size, 37) and adapter.sensitivity.shape == (size,)


def test_a_layer_of_rank_zero_trains_without_effect():
    adapter = layer(max_rank=0, rank=0)
    x = torch.randn(3, 37, requires_grad=True)
    assert torch.equal(adapter(x), F.linear(x, adapter.weight, adapter.bias))
    adapter(x).sum().backward()
    torch.testing.assert_close(x.grad, adapter.weight.sum(0).expand(3, -1))
