"""Stock PEFT models on this library's ops: PEFT's results, and PEFT itself wherever it does more than plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

from lrlora_ops import FixedRank, apply_lora
from lrlora_ops.integrations.peft import accelerate
from tests._moe import MODELS, ids, output, tiny

each_model = pytest.mark.parametrize("name", MODELS)


def stock(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A LoRA with weights that matter on all of a model, of another rank and scaling in each projection."""
    plain = tiny(name, dtype)
    plain.set_experts_implementation("eager")  # grouped_mm takes no fp64
    targets = "experts" if name == "nemotron_h" else ["experts", "all-linear"]  # PEFT refuses Mamba's layers
    adapters = apply_lora(copy.deepcopy(plain), FixedRank(1), targets)
    modules, parameters = [], []
    for key, module in adapters.modules.items():
        for projection in module.pools():
            (parameters if projection else modules).append(f"{key}.{projection}".rstrip("."))
    patterns = {"rank_pattern": {"down_proj": 2, "q_proj": 4}, "alpha_pattern": {"down_proj": 1}}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": modules, "target_parameters": parameters, **patterns}
    config = peft.LoraConfig(**settings | options)
    model = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    """The logits, and the gradients of all that trains."""
    model.zero_grad()
    y = output(model, ids())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return {"logits": y.detach()} | {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= tolerance * value.norm(), key


@each_model
def test_results_and_gradients(name):
    """In fp64, where rounding hides nothing."""
    model = stock(name, torch.float64)
    expected, state = run(model), set(model.state_dict())
    result = accelerate(model)
    assert result.taken
    assert not result.left, str(result)
    tolerance = 5e-6 if name in ("nemotron_h", "openai_privacy_filter") else 1e-10  # these compute in fp32 between
    assert_same(run(model), expected, tolerance)
    assert set(model.state_dict()) == state
    result.undo()
    assert not any("forward" in vars(layer) for layer in result.taken.values())
    assert all(torch.equal(value, expected[key]) for key, value in run(model).items())


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_projection_alone(parameter):
    model = stock("olmoe", torch.float64, target_modules=["q_proj"], target_parameters=[f"experts.{parameter}"])
    expected = run(model)
    assert len(accelerate(model).taken) == 4
    assert_same(run(model), expected, 1e-10)


def test_it_steps_aside_and_comes_back():
    """Disabled, merged and several adapters are PEFT's, bit for bit; also in a copy, and after a second call."""
    model = stock("qwen3_moe")
    before = run(model)
    reference = copy.deepcopy(model)
    accelerate(model)
    assert set(accelerate(model).taken) == set(accelerate(copy.deepcopy(model)).taken)
    fast = run(model)
    assert not all(torch.equal(fast[key], before[key]) for key in before), "PEFT computed it"
    with model.disable_adapter(), reference.disable_adapter():
        assert torch.equal(logits(model), logits(reference))
    for each in (model, reference):
        each.merge_adapter()
    assert torch.equal(logits(model), logits(reference))
    for each in (model, reference):
        each.unmerge_adapter()
        each.add_adapter("second", each.peft_config["default"])
        randomise(each)
        each.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), logits(reference))
    for each in (model, reference):
        each.base_model.set_adapter("default")
    assert (logits(model) - logits(reference)).norm() <= 1e-4 * logits(reference).norm()
    assert not torch.equal(logits(model), logits(reference)), "PEFT computed it"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), ids())


def test_a_copy_has_parameters_of_its_own():
    model = stock("olmoe")
    accelerate(model)
    copied = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        for key, parameter in copied.named_parameters():
            if "lora_B" in key:
                parameter.zero_()
    assert torch.equal(logits(model), before)
    assert (logits(copied) - before).norm() > 0.1 * before.norm()


def test_training_after_inference_mode():
    model = stock("olmoe")
    accelerate(model)
    with torch.inference_mode():
        output(model, ids())
    run(model)


def test_dropout():
    """The same distribution, not the same mask: none in evaluation, and on average nothing in training."""
    model = stock("olmoe", target_modules=["q_proj"], target_parameters=None, lora_dropout=0.5)
    reference = copy.deepcopy(model)
    accelerate(model)
    assert (logits(model) - logits(reference)).norm() <= 1e-4 * logits(reference).norm()
    layer = model.train().base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        assert not torch.equal(layer(x), layer(x))
        torch.testing.assert_close(mean, layer.eval()(x), rtol=0, atol=0.15)


def test_what_is_left_to_peft():
    """And why; it computes what it did."""
    model = stock("olmoe", target_parameters=None, use_dora=True)
    expected = run(model)
    result = accelerate(model)
    assert all(torch.equal(value, expected[key]) for key, value in run(model).items())  # DoRA is seen call by call
    result.undo()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Embedding(3, 4), nn.Linear(4, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "1", "2", "3"]))
    model.base_model.model[3].register_forward_hook(lambda *_: None)
    result = accelerate(model)
    assert list(result.taken) == ["base_model.model.0"]
    assert result.left["base_model.model.1"] == "whose base layer, a Doubled, is no plain nn.Linear"
    assert "Embedding" in result.left["base_model.model.2"]
    assert result.left["base_model.model.3"] == "which has hooks or a forward of its own"
    assert "left to PEFT: base_model.model.1, whose" in str(result)
    with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_a_base_that_trains_is_peft_s():
    model = stock("olmoe", torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_()
    expected = run(model)
    accelerate(model)
    assert all(torch.equal(value, expected[key]) for key, value in run(model).items())
