"""PEFT's checkpoints, written and read: the real library computes what the adapters do, in all of its layouts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file, save_file

from lrlora_ops import (
    Adapters,
    DynamicRank,
    FixedRank,
    LearnedRank,
    VariableRankLoRAGroupedLinear,
    apply_lora,
    load_adapter,
)
from lrlora_ops.integrations import peft_export
from lrlora_ops.integrations._peft_layout import expert_components, expert_matrices, is_swapped
from tests import peft_checkpoints
from tests._moe import MODELS, adapted, ids, output, tiny

EVERYTHING = ["experts", "all-linear"]
each_model = pytest.mark.parametrize("name", MODELS)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def targets_of(name: str) -> str | list[str]:
    """PEFT refuses linear layers of a Mamba model by their names."""
    return "experts" if name == "nemotron_h" else EVERYTHING


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), ids())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


def of_many_ranks(name: str) -> tuple[nn.Module, nn.Module, Adapters]:
    """The plain model, and a copy with adapters on everything: linear layers of rank 2, 1 and 0."""
    plain = tiny(name)
    model = copy.deepcopy(plain)
    adapters = adapted(model, targets_of(name))
    linear = [module for module in adapters.modules.values() if hasattr(module, "set_rank")]
    for index, module in enumerate(linear):
        module.set_rank(index % 3)
    return plain, model, adapters


@each_model
def test_export_is_read_by_peft(name, tmp_path, capsys):
    plain, model, adapters = of_many_ranks(name)
    expected = logits(model)
    difference = adapters.export(tmp_path / "adapter", format="peft")
    assert difference < 1e-4
    assert "read back" in capsys.readouterr().out
    assert torch.equal(logits(model), expected), "export changed the model"
    before = logits(plain)
    assert (before - expected).norm() > 0.1 * before.norm(), "the adapters do nothing"
    assert_same(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)


@each_model
def test_export_is_read_back(name, tmp_path):
    plain, model, adapters = of_many_ranks(name)
    adapters.export(tmp_path / "adapter")
    again = load_adapter(plain, tmp_path / "adapter")
    assert_same(logits(plain), logits(model))
    assert all(again.ranks()[key].max() == ranks.max() for key, ranks in adapters.ranks().items() if ranks.max())


def stock(name: str, tmp_path, **options) -> tuple[nn.Module, torch.Tensor]:
    """The plain model, and the logits of a PEFT LoRA on all of it that is saved in tmp_path."""
    plain = tiny(name)
    adapters = apply_lora(copy.deepcopy(plain), FixedRank(1), targets_of(name))
    modules, parameters = [], []
    for key, module in adapters.modules.items():
        for projection in module.pools():
            (parameters if projection else modules).append(f"{key}.{projection}".rstrip("."))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=modules,
        target_parameters=parameters,
        init_lora_weights=False,
        **copy.deepcopy(options),  # PEFT writes into them
    )
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    return plain, logits(model)


PATTERNS = {
    "rank_pattern": {"down_proj": 2, "q_proj": 4},
    "alpha_pattern": {"up_proj": 7, r"layers\.1\..*down_proj": 1},
}


@each_model
def test_stock_checkpoint(name, tmp_path):
    plain, expected = stock(name, tmp_path, **PATTERNS)
    load_adapter(plain, tmp_path)
    assert_same(logits(plain), expected)


@pytest.mark.parametrize(
    "method", [FixedRank(6), DynamicRank(4, 6, 8, total_steps=10, interval=2), LearnedRank(4, 8, total_steps=10)]
)
def test_training_goes_on(method, tmp_path):
    """With any method whose initial rank is large enough; rank-stabilised here."""
    plain, expected = stock("qwen3_moe", tmp_path, use_rslora=True, **PATTERNS)
    adapters = load_adapter(plain, tmp_path, method)
    assert_same(logits(plain), expected)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    plain.train()
    plain(input_ids=ids(), labels=ids()).loss.backward()
    adapters.step()
    optimizer.step()
    assert not torch.equal(logits(plain), expected)


def test_dropout_goes_on(tmp_path):
    """What PEFT's config says; its experts have none."""
    plain = tiny("olmoe")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.25, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path)
    assert {module.dropout for module in load_adapter(plain, tmp_path).modules.values()} == {0.25}


def test_one_projection_alone(tmp_path):
    """PEFT may adapt one of the experts' parameters; then its wrapper is not nested."""
    for parameter in ("gate_up_proj", "down_proj"):
        plain = tiny("olmoe")
        config = peft.LoraConfig(
            r=2, target_modules=[], target_parameters=[f"experts.{parameter}"], init_lora_weights=False
        )
        model = peft.get_peft_model(copy.deepcopy(plain), config)
        model.save_pretrained(tmp_path / parameter)
        load_adapter(plain, tmp_path / parameter)
        assert_same(logits(plain), logits(model))


@pytest.mark.parametrize("folder", sorted(peft_checkpoints.FOLDER.iterdir()), ids=lambda folder: folder.name)
def test_checkpoints_of_all_versions(folder):
    """Written by each version of PEFT from 0.18 on, with the logits that it gave."""
    model = peft_checkpoints.base(folder.name.partition("-")[2])
    load_adapter(model, folder)
    with torch.no_grad():
        assert_same(output(model.eval(), ids(1)), load_file(folder / "logits.safetensors")["logits"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "version", [None, "0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.2", "0.22.0.dev0@abc"]
)
def test_layouts_of_all_versions(version, transposed):
    """For E = 2, r = 1: what lora_A belongs to, where both sizes differ and where they do not."""
    a, b = torch.arange(6.0).view(2, 1, 3), torch.arange(10.0, 20.0).view(2, 1, 5)
    for swapped in (False, True):
        lora_a, lora_b = expert_matrices(a, b, swapped)
        assert is_swapped(lora_a.shape[1], 3, 5, transposed, version) is swapped
        for back, there in zip(expert_components(lora_a, lora_b, 2, swapped), (a, b), strict=True):
            assert torch.equal(back, there)
    of_outputs = {None: not transposed, "0.18.0": not transposed, "0.18.1": not transposed, "0.19.0": True}
    assert is_swapped(4, 4, 4, transposed, version) is of_outputs.get(version, False)
    with pytest.raises(ValueError, match="7 columns"):
        is_swapped(7, 3, 5, transposed, version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which plain LoRA cannot represent"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"peft_type": "LOHA"}, "method 'LOHA'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    ],
)
def test_what_cannot_be_represented(change, message, tmp_path):
    plain, _ = stock("olmoe", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    refused(plain, tmp_path, message)


def refused(plain: nn.Module, directory, message: str, **options) -> None:
    before = logits(plain)
    trainable = [p.requires_grad for p in plain.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(plain, directory, **options)
    assert torch.equal(logits(plain), before)
    assert [p.requires_grad for p in plain.parameters()] == trainable


def test_of_another_model(tmp_path):
    stock("olmoe", tmp_path)
    refused(tiny("granitemoe"), tmp_path, "has no layer in this model")
    refused(tiny("qwen3_moe"), tmp_path, "gate_up_proj maps 16 to 16 features, and the checkpoint's .* map 16 to 48")


def test_damaged(tmp_path):
    plain, _ = stock("olmoe", tmp_path)
    refused(plain, tmp_path, "starts with 2; raise the method's initial rank", method=FixedRank(2))
    tensors = load_file(tmp_path / TENSORS)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / TENSORS)
    refused(plain, tmp_path, "lacks a matrix")
    save_file(tensors | {key: tensors[key][:, 1:].contiguous()}, tmp_path / TENSORS)
    refused(plain, tmp_path, "maps 16 to 16 features")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(1)}, tmp_path / TENSORS)
    refused(plain, tmp_path, "lm_head.weight, which is not a LoRA matrix")
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:100])
    refused(plain, tmp_path, "damaged")
    (tmp_path / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_adapter(plain, tmp_path)


class Nested(nn.Module):
    """A layer whose name is also the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.block = nn.Linear(6, 6), nn.Module()
        self.block.proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.block.proj(self.proj(x).relu())


@pytest.mark.parametrize("ranks", [{"proj": 2, "block.proj": 0}, {"proj": 1, "block.proj": 3}])
def test_ambiguous_names(ranks, tmp_path):
    torch.manual_seed(0)
    plain, x = Nested().eval(), torch.randn(5, 6)
    model = copy.deepcopy(plain)
    adapters = apply_lora(model, FixedRank(3), "all-linear")
    for name, module in adapters.modules.items():
        nn.init.normal_(module.lora_B)
        module.set_rank(ranks[name])
    adapters.export(tmp_path / "adapter")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(x), model(x))


def test_a_wrong_file_does_not_stay(tmp_path, monkeypatch):
    _, _, adapters = of_many_ranks("olmoe")
    write = peft_export.write

    def wrong(adapters, directory):
        write(adapters, directory)
        tensors = load_file(directory / TENSORS)
        key = next(key for key in tensors if "experts.lora_B" in key)
        save_file(tensors | {key: 1.01 * tensors[key]}, directory / TENSORS)

    monkeypatch.setattr(peft_export, "write", wrong)
    with pytest.raises(RuntimeError, match="differs from the adapter's forward"):
        adapters.export(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_export_errors(tmp_path):
    _, _, adapters = of_many_ranks("olmoe")
    with pytest.raises(ValueError, match="format is 'gguf'; it must be one of peft"):
        adapters.export(tmp_path, format="gguf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        adapters.export(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    for module in adapters.modules.values():
        module.table.set_ranks([0] * module.table.num_experts)
    with pytest.raises(ValueError, match="every adapter has rank 0"):
        adapters.export(tmp_path / "new")
    model = nn.Sequential(VariableRankLoRAGroupedLinear(2, 4, 4))
    of_own_layers = apply_lora(model, FixedRank(2))
    with pytest.raises(ValueError, match="no counterpart in PEFT"):
        of_own_layers.export(tmp_path / "new")
    with pytest.raises(ValueError, match="no other layer's adapter"):
        of_own_layers.unadapted()
    adapters.merge()
    with pytest.raises(ValueError, match="merged"):
        adapters.export(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
