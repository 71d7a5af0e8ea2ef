"""Real transformers models (tiny, random), the real Trainer, and PEFT's LoRA as a numeric cross-check."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import FixedRank, VariableRankLoRALinear, apply_lora
from tests._training import SMALL, ids, llama, randomize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
DECODER = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    settings = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    config = transformers.BertConfig(**settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config)


DECODERS = {"llama": llama, "llama tied": lambda: llama(True), "qwen3": qwen3}


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
def test_decoders(make):
    """All projections but the head; unchanged at first, then merged with equal logits into a plain model."""
    model = make().eval()
    plain, x = copy.deepcopy(model), ids()
    adapters = apply_lora(model, FixedRank(4), "all-linear")
    assert sorted(adapters.modules) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in DECODER)
    assert torch.equal(model(x).logits, plain(x).logits)
    randomize(model)
    adapted = model(x).logits
    assert (adapted - plain(x).logits).abs().max() > 0.1
    model.train()
    model(x, labels=x).loss.backward()
    for module in adapters.modules.values():
        assert module.lora_A.grad.any() and module.lora_B.grad.any() and module.sensitivity.all()
    merged = adapters.merge().eval()
    torch.testing.assert_close(merged(x).logits, adapted, rtol=1e-3, atol=1e-3)
    assert set(merged.state_dict()) == set(plain.state_dict())


def test_bert():
    """Pooler-free masked LM: 6 linear layers a block, and the head's transform; not the decoder, which is tied."""
    model = bert().eval()
    adapters = apply_lora(model, FixedRank(4), "all-linear")
    assert len(adapters.modules) == 2 * 6 + 1
    assert "cls.predictions.transform.dense" in adapters.modules
    assert not any("decoder" in name for name in adapters.modules)
    randomize(model)
    adapted = model(ids()).logits
    torch.testing.assert_close(adapters.merge()(ids()).logits, adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["c_attn", "all-linear", "transformer.h.*"])
def test_gpt2_has_conv1d_layers(target):
    """They hold a transposed weight and have no in_features: a clear error, and an untouched model."""
    model = gpt2()
    with pytest.raises(ValueError, match=rf"target '{target}' matches no linear layer.*the linear layers are lm_head"):
        apply_lora(model, FixedRank(4), target)
    if target != "all-linear":
        with pytest.raises(ValueError, match=r"transformer.h.0.*(Conv1D|GPT2)"):
            apply_lora(model, FixedRank(4), target)
    assert all(p.requires_grad for p in model.parameters())
    apply_lora(model, FixedRank(4), "lm_head")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    """Bit for bit the same gradients, the sensitivities counted once, with dropout."""
    results = []
    for checkpointing in (False, True):
        model = llama()
        adapters = apply_lora(model, FixedRank(4), "all-linear", dropout=0.2)
        randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(2)
        model.train()(ids(), labels=ids()).loss.backward()
        results.append([p.grad for p in adapters.parameters()] + [m.sensitivity for m in adapters.modules.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_generate():
    """Through the key-value cache, one token at a time."""
    model = llama().eval()
    adapters = apply_lora(model, FixedRank(4), "all-linear")
    randomize(model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(ids(), **settings)
        assert torch.equal(adapters.merge().generate(ids(), **settings), expected)


def test_a_merged_model_is_saved_and_loaded_by_transformers(tmp_path):
    model = llama().eval()
    adapters = apply_lora(model, FixedRank(4), "all-linear")
    randomize(model)
    adapters.merge().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_peft_with_equal_weights(dtype):
    """Logits, loss and every gradient; PEFT's lora_B is ours transposed, alpha / r is our scaling."""
    ours, base = llama().to(dtype), llama().to(dtype)
    adapters = apply_lora(ours, FixedRank(4), "all-linear", lora_alpha=6)
    randomize(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules="all-linear")
    theirs = peft.get_peft_model(base, config)
    for name, adapter in adapters.modules.items():
        layer = theirs.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = adapter.lora_A.detach().clone()
        layer.lora_B["default"].weight.data = adapter.lora_B.detach().t().clone()
    x = ids()
    results = [model.train()(x, labels=x) for model in (ours, theirs)]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(results[0].logits, results[1].logits, **tolerance)
    for result in results:
        result.loss.backward()
    for name, adapter in adapters.modules.items():
        layer = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, **tolerance)
        torch.testing.assert_close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad.t(), **tolerance)


class CustomConfig(transformers.PretrainedConfig):
    model_type = "custom_with_adapters"


class CustomModel(transformers.PreTrainedModel):
    """A model of one's own that is built with its adapters."""

    config_class = CustomConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layer = VariableRankLoRALinear(6, 4, max_rank=8, rank=3)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Everything comes from the checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_from_pretrained_of_a_model_built_with_adapters(tmp_path):
    """transformers builds it on the meta device and assigns the tensors of its files."""
    model = CustomModel(CustomConfig())
    model.layer.set_rank(5)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = CustomModel.from_pretrained(tmp_path).train()
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match="weight requires a gradient"):  # transformers forgets what is frozen
        loaded(x)
    loaded.layer.weight.requires_grad_(False)
    loaded.layer.bias.requires_grad_(False)
    assert int(loaded.layer.rank) == 5
    for m in (model, loaded):
        m(x).sum().backward()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.layer.sensitivity, model.layer.sensitivity)
