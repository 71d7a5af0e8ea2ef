"""Adapters on the experts of tiny random transformers models, on every kind of experts that their interface has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from lrlora_ops import FixedRank, VariableRankLoRAExperts, apply_lora
from lrlora_ops.adapters import Adapters
from lrlora_ops.modules._interface import gating
from lrlora_ops.modules.experts import run_experts
from tests._moe import COMMON, METHODS, MODELS, NUM_EXPERTS, adapted, ids, output, tiny

EVERYTHING = ["experts", "all-linear"]
COMPUTES_IN_FP32 = {"nemotron_h", "openai_privacy_filter"}  # between their products, whatever their dtype
each_model = pytest.mark.parametrize("name", MODELS)


def merged_weights(plain: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """``W + scaling * B^T A`` of each adapted weight, by its name, differentiable by the adapters' parameters."""
    weights = {}
    for name, module in adapters.modules.items():
        for projection, pool in module.pools().items():
            key = f"{name}.{projection or 'weight'}"
            deltas = []
            for expert in range(module.table.num_experts):
                rows = module.table.rows_of(expert)
                deltas.append(module.scaling * torch.einsum("rn,rk->nk", pool.lora_B[rows], pool.lora_A[rows]))
            update = torch.stack(deltas) if projection else deltas[0]
            if projection and plain.get_submodule(name).is_transposed:
                update = update.mT
            weights[key] = plain.get_parameter(key) + update
    return weights


class Merged(nn.Module):
    """The plain model, in its own loop over the experts, with weights that are functions of the adapters."""

    def __init__(self, plain: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.plain = plain.eval()
        self.plain.set_experts_implementation("eager")
        self.adapters = (adapters,)

    def forward(self, x: Tensor) -> Tensor:
        weights = {f"plain.{k}": v for k, v in merged_weights(self.plain, self.adapters[0]).items()}
        return torch.func.functional_call(Inner(self.plain), weights, (x,))


class Inner(nn.Module):
    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        return output(self.plain, x)


def train_adapters(adapters: Adapters) -> None:
    """The adapters train; the model itself has no noise."""
    adapters.model.eval()
    for module in adapters.modules.values():
        module.train()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the norm."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance


def direction(y: Tensor) -> Tensor:
    """A gradient to send backward; the same for equal shapes."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)


def statistics(adapters: Adapters) -> list[Tensor]:
    """The gradients, the sensitivities and what was routed."""
    tables = adapters.tables.values()
    return [p.grad for p in adapters.parameters()] + [s for t in tables for s in (t.sensitivity, t.routed)]


@each_model
@pytest.mark.parametrize("targets", ["experts", EVERYTHING], ids=["experts", "all"])
def test_forward_and_gradients(name, targets):
    """In fp64, against autograd through the model's own loop over experts whose weights are merged."""
    plain = tiny(name, torch.float64)
    model, x = copy.deepcopy(plain), ids()
    adapters = adapted(model, targets)
    assert any(isinstance(m, VariableRankLoRAExperts) for m in adapters.modules.values())
    train_adapters(adapters)
    reference = Merged(plain, adapters)
    with torch.no_grad():
        before = output(plain, x)
    y, expected = output(model, x), reference(x)
    assert (y - before).norm() > 0.1 * before.norm(), "the adapters do nothing"
    parameters = dict(adapters.named_parameters())
    grads, wanted = (torch.autograd.grad(out, list(parameters.values()), direction(out)) for out in (y, expected))
    tolerance = 5e-6 if name in COMPUTES_IN_FP32 else 1e-12
    close(y, expected, tolerance)
    for grad, exact in zip(grads, wanted, strict=True):
        close(grad, exact, tolerance)


@each_model
def test_merge(name):
    """Into a plain model, in fp32, that computes the same in transformers' implementation and has the same keys."""
    plain = tiny(name)
    model, x = copy.deepcopy(plain), ids()
    adapters = adapted(model, EVERYTHING)
    with torch.no_grad():
        expected = output(model, x)
        merged = adapters.merge()
        close(output(merged, x), expected, 1e-4)
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert adapters.modules == {}


@each_model
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(name, use_reentrant):
    """Not a bit differs, and what is routed is counted once though forward runs twice."""
    results: list[list[Tensor]] = []
    choices: dict[str, tuple[Tensor, ...]] = {}
    for checkpointing in (False, True):
        model = tiny(name)
        adapters = adapted(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            for key in adapters.modules:
                model.get_submodule(key).register_forward_pre_hook(
                    lambda _, args, key=key: choices.__setitem__(key, args[1:])
                )
        model.enable_input_require_grads()
        torch.manual_seed(3)  # phimoe's router samples
        y = output(model.train(), ids())
        y.backward(direction(y))
        results.append(statistics(adapters))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for key, (index, weights) in choices.items():
        counts, sums = adapters.tables[key].routed
        assert counts.tolist() == index.flatten().bincount(minlength=NUM_EXPERTS).tolist()
        by_expert = torch.zeros(NUM_EXPERTS).index_add_(0, index.flatten(), weights.detach().flatten().float())
        torch.testing.assert_close(sums, by_expert)
    assert choices


@each_model
def test_accumulation(name):
    """Two halves of a batch add up to the whole, in the gradients, the sensitivities and what is routed."""
    results = []
    for pieces in (1, 2):
        adapters = adapted(tiny(name), EVERYTHING)
        train_adapters(adapters)
        x = ids()
        gradient = direction(output(adapters.model, x))
        for part, dy in zip(x.chunk(pieces), gradient.chunk(pieces), strict=True):
            output(adapters.model, part).backward(dy)
        results.append(statistics(adapters))
    for whole, halves in zip(*results, strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@each_model
def test_autocast(name):
    """The model gets finite gradients in bf16; what its experts compute is off by a few roundings."""
    model = tiny(name)
    adapters = adapted(model)
    train_adapters(adapters)
    arguments: dict[str, tuple[Tensor, ...]] = {}
    for key in adapters.modules:
        model.get_submodule(key).register_forward_pre_hook(lambda _, args, key=key: arguments.__setitem__(key, args))
    with torch.autocast("cpu", torch.bfloat16):
        y = output(model, ids())
    y.float().square().sum().backward()
    assert all(torch.isfinite(t).all() and t.any() for t in statistics(adapters))
    assert all(p.grad.dtype == torch.float32 for p in adapters.parameters())

    model.requires_grad_(False)
    for key, args in arguments.items():
        experts = model.get_submodule(key)
        merged = adapters.modules[key].merge(experts)
        hidden, index, weights = (t.float() if t.is_floating_point() else t for t in args)
        exact = merged(hidden, index, weights)
        with torch.autocast("cpu", torch.bfloat16):
            close(experts(*args), exact, 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_from_experts(name):
    """One experts module, adapted without apply_lora, in place: transparent at first, and its parameters frozen."""
    model = tiny(name)
    experts = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    with torch.no_grad():
        before = output(model, ids())
        adapter = VariableRankLoRAExperts.from_experts(experts, max_rank=4, rank=2)
        assert experts.lrlora is adapter
        torch.testing.assert_close(output(model, ids()), before)
    assert [n for n, p in experts.named_parameters() if p.requires_grad] == [n for n, _ in adapter_names(adapter)]
    with pytest.raises(ValueError, match="have an adapter already"):
        VariableRankLoRAExperts.from_experts(experts)


def adapter_names(adapter: VariableRankLoRAExperts) -> list[tuple[str, nn.Parameter]]:
    return [(f"lrlora.{name}", parameter) for name, parameter in adapter.named_parameters()]


def test_a_setting_of_the_model_does_not_switch_adapters_off():
    model = tiny("qwen3_moe")
    adapters = adapted(model)
    with torch.no_grad():
        before = output(model, ids())
        model.set_experts_implementation("eager")
        assert torch.equal(output(model, ids()), before)
        assert (output(adapters.merge(), ids()) - before).norm() < 1e-4 * before.norm()


def test_the_implementation_without_adapters_says_so():
    adapted(tiny("olmoe"))  # registers the implementation
    model = tiny("olmoe")
    model.config._experts_implementation_internal = "lrlora"
    with pytest.raises(ValueError, match="these experts have no adapter; call apply_lora"):
        output(model, ids())


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=40,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def llama4() -> nn.Module:
    text = COMMON | {"num_local_experts": 4, "intermediate_size_mlp": 24, "num_experts_per_tok": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text))


def jetmoe() -> nn.Module:
    config = transformers.JetMoeConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=16,
        max_position_embeddings=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.JetMoeForCausalLM(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


@pytest.mark.parametrize("make", [dbrx, llama4, jetmoe, llama])
def test_models_that_are_not_on_the_interface(make):
    """They are left as they are."""
    model = make()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no module of the model is on transformers' experts interface"):
        apply_lora(model, METHODS["experts"], "experts")
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_router_that_is_a_linear_layer_by_its_class_alone():
    """phimoe's returns a tuple: it is left out of all-linear, and cannot be named."""
    model = tiny("phimoe")
    with pytest.raises(ValueError, match="PhimoeTopKRouter, which returns choices of experts"):
        apply_lora(model, FixedRank(2), "router")
    adapters = apply_lora(model, FixedRank(2), "all-linear")
    assert adapters.modules and not any("router" in name for name in adapters.modules)


def test_quantised_experts_are_refused():
    model = tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), False)
    with pytest.raises(ValueError, match=r"layers.1.*down_proj is not a floating-point.*unquantised"):
        apply_lora(model, METHODS["experts"], "experts")
    assert not hasattr(model.model.layers[0].mlp.experts, "lrlora")


# Whose activation the kernels know; the others bring a function of their own, or have no gate.
NAMED = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe"),
    *("lfm2_moe", "qwen3_next", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe", "aria_text", "muse_spark_text"),
    *("dots1", "flex_olmo"),
}


def first_experts(name: str) -> nn.Module:
    adapters = adapted(tiny(name))
    return adapters.model.get_submodule(next(iter(adapters.modules)))


@each_model
def test_kernels_compute_what_the_model_says(name):
    """The experts of each family by the interpreted kernels, against PyTorch in fp64: result and gradients."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter takes CPU tensors; the GPU tests have their own")
    experts, results = first_experts(name), []
    assert (gating(experts) == "silu") == (name in NAMED)
    for host, backend in ((experts, "triton"), (copy.deepcopy(experts).double(), "eager")):
        adapter, dtype = host.lrlora, host.down_proj.dtype
        generator = torch.Generator().manual_seed(0)
        width = adapter.pools()["down_proj"].out_features
        x = torch.randn(5, width, generator=generator).to(dtype).requires_grad_()
        weights = torch.rand(5, 2, generator=generator).to(dtype).requires_grad_()
        index = torch.rand(5, NUM_EXPERTS, generator=generator).topk(2).indices
        pools = [(pool.lora_A, pool.lora_B, None) for pool in adapter.pools().values()]
        y = run_experts(host, x, index, weights, pools, adapter.table, scaling=adapter.scaling, backend=backend)
        leaves = [x, weights, *(p for a, b, _ in pools for p in (a, b))]
        results.append([y, *torch.autograd.grad(y, leaves, direction(y))])
    for actual, exact in zip(*results, strict=True):
        close(actual, exact, 2e-6)


@pytest.mark.parametrize("change", ["method", "instance", "hook", "forward", "other"])
def test_a_changed_activation_is_the_models_own(change, monkeypatch):
    """Nothing is taken for SiLU that is not exactly transformers' own."""
    experts = first_experts("qwen3_moe")
    assert gating(experts) == "silu"
    if change == "method":
        monkeypatch.setattr(type(experts), "_apply_gate", lambda self, gate_up: gate_up.chunk(2, -1)[0])
    elif change == "instance":
        experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    elif change == "hook":
        experts.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "forward":
        experts.act_fn.forward = torch.relu
    else:
        experts.act_fn = nn.ReLU()
    assert gating(experts) == experts._apply_gate


def test_the_tanh_gelu_is_known():
    experts = first_experts("qwen3_moe")
    for name, known in (("gelu_pytorch_tanh", True), ("gelu", False), ("swish", False), ("quick_gelu", False)):
        experts.act_fn = transformers.activations.ACT2FN[name]
        assert (gating(experts) == "gelu_tanh") == known
    experts.act_fn = nn.SiLU()
    assert gating(experts) == "silu"
