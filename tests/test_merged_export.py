"""The merged export: a plain transformers checkpoint, and a model that is afterwards what it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file

from lrlora_ops import FixedRank, SincUpdate, apply_lora
from lrlora_ops.integrations import merged_export
from tests._moe import MODELS, adapted, ids, output, tiny

EVERYTHING = ["experts", "all-linear"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), ids())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    # As bits: what no expert owns is NaN.
    assert all(torch.equal(after[key].view(torch.uint8), t.view(torch.uint8)) for key, t in before.items() if t.dim())


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_gives_the_logits(name, tmp_path, capsys):
    plain = tiny(name)
    model = copy.deepcopy(plain)
    adapters = adapted(model, EVERYTHING)
    expected, before = logits(model), state(model)
    assert adapters.export(tmp_path / "merged", format="merged") < 1e-4
    assert "merged, read back" in capsys.readouterr().out
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert set(again.state_dict()) == set(plain.state_dict())
    assert (logits(again) - expected).norm() <= 1e-4 * expected.norm()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_learned_functions_of_elements(tmp_path):
    plain = tiny("mixtral")
    model = copy.deepcopy(plain)
    adapters = apply_lora(model, SincUpdate(2, num_coefficients=3, share="global"), "all-linear")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    expected, before = logits(model), state(model)
    assert not torch.allclose(logits(plain), expected, rtol=0.01)
    assert adapters.export(tmp_path / "merged", format="merged") < 1e-4
    assert_unchanged(model, before)
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(again) - expected).norm() <= 1e-4 * expected.norm()


def test_in_bf16(tmp_path):
    """Each weight is rounded once."""
    model = tiny("olmoe", torch.bfloat16)
    adapters = adapted(model, EVERYTHING)
    adapters.export(tmp_path / "merged", format="merged")
    merged = adapters.merge()
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in merged.state_dict().items())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    model = tiny("qwen3_moe")
    adapters = adapted(model, EVERYTHING)
    before = state(model)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        adapters.export(tmp_path / "merged", format="merged")
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_does_not_stay(tmp_path, monkeypatch):
    model = tiny("olmoe")
    adapters = adapted(model, EVERYTHING)
    write = merged_export.write

    def wrong(adapters, directory):
        write(adapters, directory)
        tensors = load_file(directory / "model.safetensors")
        key = next(key for key in tensors if "experts" in key)
        save_file(tensors | {key: 1.01 * tensors[key]}, directory / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merged_export, "write", wrong)
    with pytest.raises(RuntimeError, match="differs from the adapter's forward"):
        adapters.export(tmp_path / "merged", format="merged")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    adapters = apply_lora(nn.Sequential(nn.Linear(3, 4)), FixedRank(2), "all-linear")
    with pytest.raises(ValueError, match="a Sequential has no save_pretrained"):
        adapters.export(tmp_path / "merged", format="merged")
    model = tiny("olmoe")
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    with pytest.raises(ValueError, match=r"q_proj shares its weight with another layer; call Adapters.merge"):
        apply_lora(model, FixedRank(2), "all-linear").export(tmp_path / "merged", format="merged")
    assert not list(tmp_path.iterdir())


PEAK = """
import re, sys, threading, time
import torch, transformers
from lrlora_ops import FixedRank, SincUpdate, apply_lora

highest = 0.0

def held():
    # Memory of the process's own, in MiB: files that are mapped belong to the page cache.
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def watch():
    global highest
    while True:
        highest = max(highest, held())
        time.sleep(0.002)

sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
config = transformers.AutoConfig.for_model("llama", vocab_size=1000, num_hidden_layers=8, **sizes)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
started = held()
model.to_empty(device="cpu")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05)
adapters = apply_lora(model, FixedRank(4), "all-linear")
for module in adapters.modules.values():
    torch.nn.init.normal_(module.lora_B, std=0.1)
before = held()
threading.Thread(target=watch, daemon=True).start()
adapters.export(sys.argv[1], "merged")
size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
print(size, before - started, highest - before)
"""


@pytest.mark.slow
def test_no_second_copy_of_the_model_is_held(tmp_path):
    """The process's own memory grows by less than half of the model meanwhile; a copy would be all of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "merged")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    size, model, export = map(float, finished.stdout.split()[-3:])
    assert size > 400 and 0.5 * size < model < 1.2 * size, "what is watched must be what the model takes"
    assert export < 0.5 * size
