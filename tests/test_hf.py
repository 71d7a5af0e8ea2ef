"""Real transformers models (tiny, random), the real Trainer, and PEFT's LoRA as a numeric cross-check."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, apply_lora

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # with 0.02 a broken adapter moves the logits by less than rounding
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
DECODER = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied))


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


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, VariableRankLoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, 40, (rows, 12), generator=torch.Generator().manual_seed(0))


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


class Text(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.randint(3, 40, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def trainer(model, adapters, path, callbacks=(), **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **({"max_steps": 10, "save_strategy": "no"} | settings),
    )
    callbacks = [*callbacks, adapters.callback()]
    return transformers.Trainer(model=model, args=arguments, train_dataset=Text(), callbacks=callbacks)


class Count(transformers.TrainerCallback):
    """What had been done when the adapters' step was due."""

    def __init__(self, adapters) -> None:
        self.adapters, self.steps, self.sensitivities, self.updates = adapters, 0, [], 0
        step = adapters.step
        adapters.step = lambda *args: (self.before(), step(*args))[1]

    def before(self) -> None:
        self.steps += 1
        assert self.steps == self.updates + 1, "once per optimizer step, and before it"
        self.sensitivities.append(sum(m.sensitivity.abs().sum() for m in self.adapters.modules.values()))

    def on_optimizer_step(self, *_, **__) -> None:
        self.updates += 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_steps_the_method(tmp_path, accumulation):
    """Once per optimizer step, with the trainer's length of the run; the ranks meet the budget and stay."""
    model = llama()
    adapters = apply_lora(model, LearnedRank(3, 6, lr=0.5), "all-linear")
    count = Count(adapters)
    run = trainer(model, adapters, tmp_path, [count], gradient_accumulation_steps=accumulation)
    run.train()
    (policy,) = adapters.policies
    assert (policy.total_steps, policy.t, policy.frozen) == (10, 8, True)
    assert count.steps == count.updates == 10
    assert all(value > 0 for value in count.sensitivities[1:])  # at first b = 0, and c with it
    ranks = [int(rank) for rank in adapters.ranks().values()]
    assert sum(ranks) == 3 * len(ranks) and len(set(ranks)) > 1
    assert not list(tmp_path.glob("**/lrlora*"))


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """In the sensitivities that the method sees."""
    seen = []
    for size, accumulation in ((6, 1), (2, 3)):
        model = llama()
        torch.manual_seed(5)
        adapters = apply_lora(model, FixedRank(4), "all-linear")
        randomize(model)
        count = Count(adapters)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            use_cpu=not torch.cuda.is_available(), **settings,
        )  # fmt: skip
        callbacks = [count, adapters.callback()]
        transformers.Trainer(model=model, args=arguments, train_dataset=Text(), callbacks=callbacks).train()
        seen.append(torch.stack(count.sensitivities))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("saved_at", [4, 9])
def test_the_trainer_resumes_bit_for_bit(tmp_path, saved_at):
    """Weights, ranks and the method's state, before the freeze (step 8) and after it."""

    def start(path, **settings):
        model = llama()
        torch.manual_seed(3)
        adapters = apply_lora(model, LearnedRank(3, 6, lr=0.5), "all-linear", dropout=0.1)
        return model, adapters, trainer(model, adapters, path, save_strategy="steps", save_steps=saved_at, **settings)

    model, adapters, run = start(tmp_path)
    run.train()
    resumed, others, run = start(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    for (name, value), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    one, two = (policies[0].state_dict() for policies in (adapters.policies, others.policies))
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, Tensor) else value == two[key]


def test_resuming_without_the_method_s_state_is_an_error(tmp_path):
    """The trainer's own files would start the method anew in the middle of the run."""
    model = llama()
    adapters = apply_lora(model, LearnedRank(3, 6), "all-linear")
    trainer(model, adapters, tmp_path, save_strategy="steps", save_steps=5).train()
    (tmp_path / "checkpoint-5" / "lrlora_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-5 holds no lrlora_state.json"):
        trainer(model, apply_lora_again(model), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def apply_lora_again(model: nn.Module):
    return apply_lora(model, LearnedRank(3, 6))


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
