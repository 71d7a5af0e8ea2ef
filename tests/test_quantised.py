"""Adapters around quantised layers of bitsandbytes and torchao: exact beside the base, merged only where it holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")
from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, apply_lora, load_adapter
from lrlora_ops.modules._quantised import dequantised, requantised
from tests import _quantised
from tests._models import optimize, trained
from tests._moe import output, tiny
from tests._oracle import assert_within_budget
from tests._quantised import FOUR_BIT, dtype_of, meaning, quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:Calling register_constant"),
]
each_kind = pytest.mark.parametrize("name", _quantised.ALL)


def wrapped(name: str, std: float = 0.1, **options) -> VariableRankLoRALinear:
    """An adapter of rank 5 of 8 that does something."""
    adapter = VariableRankLoRALinear.from_linear(quantised(name, _quantised.linear()), max_rank=8, rank=5, **options)
    nn.init.normal_(adapter.lora_B, std=std)
    return adapter


def bits(layer: nn.Module) -> list[Tensor]:
    """What the layer's weight is made of, as bytes. bitsandbytes itself casts the bias."""
    weight = layer.weight
    parts = [getattr(weight, name) for name in getattr(weight, "tensor_data_names", ())] or [weight.data]
    return [part.contiguous().view(torch.uint8).clone() for part in parts]


@each_kind
def test_forward_and_every_gradient(name):
    """As an fp64 layer of the dequantised weight: y, x, A, B and the gate, which is the sensitivity."""
    adapter, dtype = wrapped(name), dtype_of(name)
    assert adapter.weight is None and adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
    assert not any(p.requires_grad for p in adapter.base_layer.parameters())
    x = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 7, 48, dtype=dtype)
    with torch.no_grad():
        adapter.table.gate[:5] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5])
    y = adapter(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    actual = [y.detach(), x.grad, adapter.lora_A.grad[:5], adapter.lora_B.grad[:5], adapter.sensitivity[:5]]
    assert not adapter.lora_A.grad[5:].any() and not adapter.lora_B.grad[5:].any()

    def layer(dtype: torch.dtype) -> list[Tensor]:
        w, bias = meaning(adapter.base_layer).to(dtype), adapter.base_layer.bias.to(dtype)
        leaves = [x, adapter.lora_A[:5], adapter.lora_B[:5], adapter.table.gate[:5]]
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        x_, a, b, gate = leaves
        out = x_ @ w.t() + bias + adapter.scaling * (x_ @ a.t() * gate) @ b
        return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(dtype))]

    for got, exact, plain in zip(actual, layer(torch.float64), layer(dtype), strict=True):
        assert_within_budget(got, exact, plain)


@each_kind
def test_it_trains_and_moves_the_output(name):
    """Every live component gets a gradient, the loss falls, the output follows, and no bit of the base changes."""
    adapter, dtype = wrapped(name, std=0.0), dtype_of(name)
    adapters = apply_lora(nn.Sequential(adapter), FixedRank(5))
    x = torch.randn(64, 64, dtype=dtype)
    with torch.no_grad():
        before = adapter(x)
        wanted = before + x @ torch.randn(64, 2, dtype=dtype) @ torch.randn(2, 48, dtype=dtype) / 8
    base = bits(adapter.base_layer)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.02)
    losses = [optimize((adapter(x) - wanted).float().square().mean(), adapters, optimizer) for _ in range(60)]
    assert adapter.lora_A.grad[:5].any(1).all() and adapter.lora_B.grad[:5].any(1).all()
    assert losses[-1] < 0.1 * losses[0]
    assert (adapter(x) - before).norm() > 0.5 * (wanted - before).norm()
    assert all(map(torch.equal, base, bits(adapter.base_layer)))


class Net(nn.Module):
    """Quantised layers beside a plain one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        dtype = dtype_of(name)
        self.up, self.down = (quantised(name, _quantised.linear(64, 64)) for _ in range(2))
        self.last = _quantised.linear(64, 48).to(dtype)
        self.recompute = False

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.last(x)


def data(name: str, rows: int = 6) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(3)).to(dtype_of(name))


@each_kind
def test_all_linear_finds_them_and_they_are_saved(name, tmp_path):
    model = Net(name)
    adapters = apply_lora(model, LearnedRank(mean_rank=3, max_rank=6, total_steps=10), "all-linear")
    assert sorted(adapters.modules) == ["down", "last", "up"]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{side}" for n in adapters.modules for side in "AB"}
    trained(model)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.01)
    for _ in range(3):
        optimize(model(data(name)).float().square().mean(), adapters, optimizer)
    adapters.save(tmp_path)
    again = Net(name)
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(data(name)), model.eval()(data(name)))


@each_kind
def test_the_state_dict_holds_base_and_adapters(name):
    """Another model of the same layers, whose adapters do something else, becomes the same."""
    model, again = Net(name), Net(name)
    for made in (model, again):
        apply_lora(made, FixedRank(3), "all-linear")
    trained(model)
    strict = name not in FOUR_BIT  # which bitsandbytes writes, and does not load into a layer that is there
    found = again.load_state_dict(copy.deepcopy(model.state_dict()), strict=strict)
    assert not found.missing_keys and all(".base_layer.weight." in key for key in found.unexpected_keys)
    assert torch.equal(again.eval()(data(name)), model.eval()(data(name)))


@each_kind
def test_gradient_checkpointing_changes_nothing(name):
    model = trained(Net(name))
    adapters = apply_lora(model, FixedRank(3), "all-linear")
    trained(model)
    gradients = []
    for model.recompute in (False, True):
        for parameter in adapters.parameters():
            parameter.grad = None
        for table in adapters.tables.values():
            table.clear_statistics()
        model(data(name).requires_grad_()).float().square().mean().backward()
        gradients.append([p.grad.clone() for p in adapters.parameters()] + [model.up.sensitivity.clone()])
    assert all(map(torch.equal, *gradients)) and all(g.any() for g in gradients[0])


# torchao multiplies no bf16 rows with an fp32 weight of the other kinds.
@pytest.mark.parametrize("name", [name for name in _quantised.ALL if name not in ("fp8", "int4")])
def test_autocast(name):
    """bf16 out, within bf16's rounding of the same without autocast."""
    adapter = wrapped(name)
    x = data(name)
    expected = adapter(x).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    y.float().sum().backward()
    assert adapter.lora_B.grad[:5].any() and adapter.lora_B.grad.dtype == torch.float32
    assert (y.float() - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_base_that_gives_no_gradient_is_an_error():
    """torchao's int8 activations cut the graph: layers below would train on the adapter's part alone."""
    adapter = wrapped("int8 activations")
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"base layer, a Linear, gives x no gradient.*quantise the weights alone"):
        adapter(x)
    assert adapter(x.detach()).requires_grad
    adapter.eval()(x)


def test_a_base_for_inference_alone():
    """torchao's int4 layout for CPUs: exact beside it, but nothing trains below it, and nobody merges into it."""
    adapter = wrapped("int4 opaque")
    base, x, dy = adapter.base_layer, torch.randn(7, 64), torch.randn(7, 48)
    weight = (base(torch.eye(64)) - base.bias).t().detach().double()
    assert (weight - _quantised.linear().weight).norm() < 0.2 * weight.norm()
    y = adapter(x)
    y.backward(dy)
    a, b = (factor.detach().double() for factor in (adapter.lora_A, adapter.lora_B))
    a[5:] = 0
    expected = x.double() @ (weight + adapter.scaling * b.t() @ a).t() + base.bias.double()
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-4, atol=1e-4)
    d_a, d_b = b[:5] @ dy.double().t() @ x.double(), a[:5] @ x.double().t() @ dy.double()
    for grad, exact in ((adapter.lora_A.grad[:5], d_a), (adapter.lora_B.grad[:5], d_b)):
        torch.testing.assert_close(grad.double(), adapter.scaling * exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"gives x no gradient.*IntxWeightOnlyConfig"):
        adapter(x.requires_grad_())
    with pytest.raises(ValueError, match=r"Int4OpaqueTensor; export\(format='peft'\)"):
        adapter.merge()


def quantised_experts(quantise) -> nn.Module:
    model = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            quantise(layer.mlp.experts, name)
    return model


def test_experts_that_bitsandbytes_quantised(tmp_path):
    """To the adapters they are what they stand for, bit for bit; merged and exported are they elsewhere."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = quantised_experts(lambda experts, name: parametrize.replace_parameter_4bit(experts, name, quant_type="nf4"))
    plain = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    with torch.no_grad():
        for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(other.mlp.experts, name).copy_(getattr(layer.mlp.experts, name))
    results = []
    for each in (plain, model):
        torch.manual_seed(0)
        adapters = apply_lora(each, FixedRank(3), "experts")
        for parameter in adapters.parameters():
            nn.init.normal_(parameter, std=0.1)
        y = output(each.train(), IDS)
        y.square().mean().backward()
        results.append([y.detach(), *(parameter.grad for parameter in adapters.parameters())])
    assert all(map(torch.equal, *results)) and all(t.any() for t in results[0])
    stored = model.model.layers[0].mlp.experts.parametrizations.gate_up_proj.original
    assert stored.dtype == torch.uint8 and not stored.requires_grad
    for attempt in (adapters.merge, lambda: adapters.export(tmp_path / "peft")):
        with pytest.raises(ValueError, match=r"bitsandbytes quantises experts.*load_adapter"):
            attempt()
    adapters.save(tmp_path / "own")
    load_adapter(tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32), tmp_path / "own").merge()


def test_experts_that_torchao_quantised_are_refused():
    tensors = pytest.importorskip("torchao.quantization")

    def quantise(experts, name):
        weight = tensors.Int8Tensor.from_hp(getattr(experts, name).detach(), tensors.PerRow())
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))

    with pytest.raises(ValueError, match=r"gate_up_proj is not .* but a Int8Tensor; .*unquantised"):
        apply_lora(quantised_experts(quantise), FixedRank(3), "experts")


@each_kind
def test_weights_are_read_and_quantised_as_the_library_does(name):
    """What the layer was made from gives its weight again, bit for bit."""
    layer = quantised(name, _quantised.linear())
    for seen in (layer, layer.requires_grad_(False)):
        assert (dequantised(seen).double() - meaning(seen)).norm() <= 1e-6 * meaning(seen).norm()
        made = requantised(seen, _quantised.linear().weight.detach())
        assert made is not seen and type(made.weight) is type(layer.weight)
        assert all(map(torch.equal, bits(made), bits(layer)))
        x = data(name)
        assert torch.equal(made(x), layer(x))  # and again, since bitsandbytes moves its scales in the first call


@pytest.mark.parametrize("name", FOUR_BIT)
def test_evaluation_packs_no_weight(name):
    """On CPUs with AVX512-BF16 bitsandbytes packs what it evaluates, and a packed layer has no derivative."""
    functional = pytest.importorskip("bitsandbytes.functional")
    gradients = []
    for evaluated in (False, True):
        model = Net(name)
        if evaluated:
            for layer in (model.up, model.down):
                layer.support_avx512bf16_for_cpu = True  # whatever this machine has
                weight = layer.weight
                weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )
        adapters = apply_lora(model, FixedRank(3), "up")  # which is to train through the other layers
        trained(model)
        if evaluated:
            with torch.no_grad():
                model.eval()(data(name))
        model.train()(data(name)).float().square().mean().backward()
        gradients.append(adapters.modules["up"].lora_A.grad[:3])
        wanted = meaning(quantised(name, _quantised.linear(64, 64)))
        for layer in (model.up.base_layer, model.down):
            assert (dequantised(layer) - wanted).norm() <= 0.02 * wanted.norm()
    assert (gradients[1] - gradients[0]).norm() <= 0.02 * gradients[0].norm()  # packing rounds the scales to bf16


@each_kind
def test_merge_where_the_weight_holds_the_update(name):
    """8 bits beside bf16 do; 4 bits, fp8, and whatever computes in fp32, do not."""
    adapter = wrapped(name, std=0.02)
    base, x = bits(adapter.base_layer), torch.randn(32, 64, dtype=dtype_of(name))
    expected = adapter.eval()(x)
    if name == "int8 bf16":
        merged = adapter.merge()
        assert type(merged.weight) is type(adapter.base_layer.weight)
        assert merged.weight.qdata.dtype == torch.int8 and not merged.weight.requires_grad
        assert (merged(x) - expected).norm() <= 0.0079 * expected.norm()
        assert (merged(x) - adapter.base_layer(x)).norm() > 0.01 * expected.norm()
    else:
        with pytest.raises(RuntimeError, match=r"differs .* by .* too coarse.* export\(format='peft'\).*load_adapter"):
            adapter.merge()
    assert all(map(torch.equal, base, bits(adapter.base_layer)))
    assert torch.equal(adapter(x), expected)


@each_kind
def test_merge_of_no_update_is_the_base(name):
    adapter = wrapped(name, std=0.0)
    x = torch.randn(4, 64, dtype=dtype_of(name))
    assert torch.equal(adapter.merge()(x), adapter.base_layer(x))


def bitsandbytes_config(**settings):
    pytest.importorskip("bitsandbytes")
    return transformers().BitsAndBytesConfig(**settings)


def torchao_config(name: str):
    return transformers().TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


def transformers():
    return pytest.importorskip("transformers")


CONFIGS = {
    "nf4": lambda: bitsandbytes_config(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    ),
    "8 bit": lambda: bitsandbytes_config(load_in_8bit=True),
    "int8": lambda: torchao_config("Int8WeightOnlyConfig"),
    "fp8": lambda: torchao_config("Float8WeightOnlyConfig"),
}
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
IDS = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The directory of a small language model."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    config = transformers().AutoConfig.for_model("llama", **sizes, **heads)
    path = tmp_path_factory.mktemp("model")
    transformers().AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def read(stored, name: str | None = None) -> nn.Module:
    settings = {} if name is None else {"quantization_config": CONFIGS[name]()}
    load = transformers().AutoModelForCausalLM.from_pretrained
    return load(stored, dtype=torch.bfloat16, device_map="cpu", **settings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 0.02 * expected.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_transformers_quantised(name, stored, tmp_path):
    """It trains, PEFT computes the same from the export, and the adapters go on to the unquantised model."""
    peft = pytest.importorskip("peft")
    model = read(stored, name)
    plain = logits(model)
    adapters = apply_lora(model, FixedRank(4), "all-linear")
    assert sorted(adapters.modules) == sorted(f"model.layers.{i}.{layer}" for i in range(2) for layer in LAYERS)
    assert all(module.base_layer is not None for module in adapters.modules.values())
    model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.02)
    losses = [optimize(model(input_ids=IDS, labels=IDS).loss, adapters, optimizer) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    expected = logits(model)
    assert not close(expected, plain)

    adapters.export(tmp_path / "peft")
    assert close(logits(peft.PeftModel.from_pretrained(read(stored, name), tmp_path / "peft")), expected)

    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: .*no plain.*export\(format='peft'\).*load_adapter"
    ):
        adapters.export(tmp_path / "merged", format="merged")
    assert not (tmp_path / "merged").exists()

    adapters.save(tmp_path / "own")
    unquantised = read(stored)
    moved = load_adapter(unquantised, tmp_path / "own")
    beside = logits(unquantised)
    assert close(logits(moved.merge()), beside) and not close(beside, plain)

    if name == "int8":
        assert close(logits(adapters.merge()), expected)
        return
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.q_proj: .*too coarse to hold it: export"):
        adapters.merge()
    assert torch.equal(logits(model), expected)
