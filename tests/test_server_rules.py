"""The rules of vLLM's and SGLang's loaders reject what breaks them, and no export leaves such a file behind."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from lrlora_ops.integrations import sglang_export, vllm_export
from tests import _sglang, _vllm
from tests._moe import adapted, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def edit(directory, change) -> None:
    """Change the tensors and the config of an adapter; ``change`` gets both."""
    tensors, config = load_file(directory / TENSORS), json.loads((directory / CONFIG).read_text())
    change(tensors, config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / TENSORS)
    (directory / CONFIG).write_text(json.dumps(config))


def key_of(tensors, part: str) -> str:
    return next(key for key in tensors if part in key)


def without(part: str):
    return lambda t, c: t.pop(key_of(t, part))


def renamed(part: str, new: str):
    def change(t, c):
        for key in [key for key in t if part in key]:
            t[key.replace(part, new)] = t.pop(key)

    return change


def longer(part: str):
    """One more zero row of lora_A, and column of lora_B."""

    def change(t, c):
        for letter, dim in (("A", 0), ("B", 1)):
            key = key_of(t, f"{part}.lora_{letter}")
            t[key] = torch.cat([t[key], torch.zeros_like(t[key].narrow(dim, 0, 1))], dim)

    return change


def config(**options):
    return lambda t, c: c.update(options)


def also(part: str, new: str):
    """A second layer of another name."""

    def change(t, c):
        for key in [key for key in t if part in key]:
            t[key.replace(part, new)] = t[key].clone()

    return change


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, c: t.update(
            {key_of(t, "experts.2.down_proj.lora_B"): 1.01 * t[key_of(t, "experts.2.down_proj.lora_B")]}
        ),
        lambda t, c: t.update({key_of(t, "q_proj.lora_A"): -t[key_of(t, "q_proj.lora_A")]}),
        lambda t, c: c.update(lora_alpha=2 * c["r"]),
        lambda t, c: also("layers.0.self_attn.o_proj", "layers.0.mtp")(t, c),
    ],
)
def test_a_wrong_file_does_not_stay(server, spoil, tmp_path, monkeypatch):
    module = {"vllm": vllm_export, "sglang": sglang_export}[server]
    write = module.write

    def wrong(adapters, directory):
        write(adapters, directory)
        edit(directory, spoil)

    monkeypatch.setattr(module, "write", wrong)
    adapters = adapted(tiny("qwen3_moe"), ["experts", "all-linear"])
    with pytest.raises(RuntimeError, match=r"differs from the adapter's forward|which has no adapter here"):
        adapters.export(tmp_path / "adapter", format=server)
    assert not list(tmp_path.iterdir())


BROKEN_VLLM = [
    ("qwen3_moe", config(r=0), "must be a positive integer"),
    ("qwen3_moe", config(rank_pattern={"o_proj": 9}), "greater than max_lora_rank"),
    ("qwen3_moe", config(use_dora=True), "does not support use_dora"),
    ("qwen3_moe", config(bias="all"), "bias is not supported"),
    ("qwen3_moe", config(modules_to_save=["lm_head"]), "modules_to_save"),
    ("qwen3_moe", config(init_lora_weights="pissa"), "init_lora_weights"),
    ("qwen3_moe", lambda t, c: c.pop("target_modules"), "Missing required"),
    (
        "qwen3_moe",
        lambda t, c: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
        "unsupported LoRA weight",
    ),
    ("qwen3_moe", without("experts.2.up_proj.lora_B"), "lacks a matrix"),
    (
        "qwen3_moe",
        lambda t, c: [t.pop(key_of(t, f"0.mlp.experts.2.up_proj.lora_{m}")) for m in "AB"],
        "every expert needs all",
    ),
    ("qwen3_moe", longer("0.mlp.experts.1.gate_proj"), "different LoRA ranks"),
    ("qwen3_moe", longer("q_proj"), "ranks 9 and 9 of 8"),
    ("qwen3_moe", also("q_proj", "rotary"), "expected target modules"),
    ("qwen3_moe", renamed("experts.1.down_proj", "experts.1.w2"), "expected target modules"),
    ("qwen3_moe", renamed("model.layers", "layers"), "no layer of the model: silently ignored"),
    ("qwen3_moe", also("0.self_attn.q_proj", "7.self_attn.q_proj"), "no layer of the model: silently ignored"),
    ("qwen3_moe", also("0.self_attn.q_proj", "0.mlp.experts"), "fused 3D weights for a 2D wrapper"),
    ("gpt_oss", without("0.mlp.experts.lora_A"), "lacks a matrix"),
    (
        "gpt_oss",
        lambda t, c: [t.pop(key_of(t, f"0.mlp.experts.lora_{m}")) for m in "AB"],
        "needs gate_up_proj and down_proj",
    ),
    ("gpt_oss", renamed("experts.base_layer", "experts.0.gate_up_proj"), "expected target modules"),
    ("deepseek_v3", also("q_b_proj", "kv_b_proj"), "read without a call"),
]
BROKEN_SGLANG = [
    ("qwen3_moe", config(target_modules="all-linear-layers"), "must be a list"),
    ("qwen3_moe", config(target_modules=["q_proj"]), "matches no target module"),
    ("qwen3_moe", config(target_modules=["q_proj", "x_proj"]), "get_hidden_dim not implemented for .*x_proj"),
    ("qwen3_moe", config(use_dora=True), "not a plain LoRA"),
    ("qwen3_moe", config(r=8), "buffer"),
    ("qwen3_moe", without("v_proj.lora_A"), "without k_proj and v_proj"),
    ("qwen3_moe", longer("o_proj"), "buffer"),
    ("qwen3_moe", longer("experts.1.gate_proj"), "sizes must match"),
    ("qwen3_moe", renamed("experts.3.", "experts.4."), "there is no expert 4"),
    ("qwen3_moe", without("experts.2.down_proj.lora_B"), "lacks a matrix"),
    ("qwen3_moe", renamed("model.layers", "model.blocks"), "in no layer: ignored"),
    ("qwen3_moe", also("0.self_attn.o_proj", "7.self_attn.o_proj"), "no module of the model: ignored"),
    ("qwen3_moe", also("0.self_attn.o_proj", "0.mlp.o_proj"), "buffer is taken"),
    ("qwen3_moe", renamed("experts.1.down_proj", "experts.1.x_proj"), "matches no target module"),
    ("qwen2_moe", renamed("mlp.experts", "mlp.shared_experts"), "indexed shared expert"),
    ("nemotron_h", renamed("experts.1.gate_proj", "experts.1.up_proj"), "matches no target module"),
]


@pytest.mark.parametrize(
    ("server", "name", "change", "message"),
    [("vllm", *case) for case in BROKEN_VLLM] + [("sglang", *case) for case in BROKEN_SGLANG],
)
def test_the_rules_reject_what_breaks_them(server, name, change, message, tmp_path):
    plain = tiny(name)
    attention = ["q_a_proj", "q_b_proj"] if name == "deepseek_v3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapters = adapted(copy.deepcopy(plain), ["experts", *attention])
    adapters.export(tmp_path / "adapter", format=server)
    options = {"vllm": (8,), "sglang": ()}[server]
    rules = {"vllm": _vllm, "sglang": _sglang}[server]
    rules.load(tmp_path / "adapter", plain, *options)
    edit(tmp_path / "adapter", change)
    with pytest.raises(rules.Refused, match=message):
        rules.load(tmp_path / "adapter", plain, *options)
