"""The lrlora command: errors of one line that say what to do, real runs on small models, what they leave behind."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lrlora_ops import load_adapter
from lrlora_ops.cli import app
from lrlora_ops.finetune.arm import Arm
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.finetune.tokens import encode, train_tokenizer
from lrlora_ops.finetune.trainer import Recipe
from tests._cli import TEXT, assert_one_line, forget, gpt2_without_linear_layers, llama, qwen3_moe

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "12", "--batch-size", "4", "--seq-len", "16", "--lr", "1e-2", "--device", "cpu"]
LEARNED = ["--method", "learned", "--mean-rank", "2"]
FIXED = ["--method", "fixed", "--rank", "2"]
SINC = ["--method", "sinc", "--rank", "2", "--grid", "0.01", "--share", "global"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory of models and files, good and bad."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer([TEXT], 300)
    for name, model in (
        ("llama", llama()),
        ("gpt2", gpt2_without_linear_layers()),
        ("half", llama().half()),
        ("qwen3_moe", qwen3_moe()),
    ):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    shutil.copytree(directory / "llama", directory / "damaged")
    (directory / "damaged" / "model.safetensors").write_bytes(b"not a tensor file")
    shutil.copytree(directory / "llama", directory / "vision")
    (directory / "vision" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (directory / "no-model").mkdir()
    (directory / "text").write_text(TEXT)
    (directory / "empty").write_text(" \n")
    (directory / "short").write_text("a few words\n")
    (directory / "binary").write_bytes(b"text\0text")
    (directory / "latin-1").write_bytes("Größe".encode("latin-1"))
    (directory / "occupied").mkdir()
    (directory / "occupied" / "thesis").write_text("do not touch")
    return directory


def finetune(inputs, output, *options, model="llama", train="text"):
    options = options if "--method" in options else (*LEARNED, *options)
    command = ["finetune", "--model", inputs / model, "--train", inputs / train, "--output", output, *SMALL, *options]
    return CliRunner().invoke(app, [str(word) for word in command])


def run_export(inputs, adapter, output, *options, model="llama"):
    command = ["export", "--model", inputs / model, "--adapter", adapter, "--output", output, *options]
    return CliRunner().invoke(app, [str(word) for word in command])


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export(inputs, tmp_path, format):
    """What finetune wrote, read by the other library, computes what the adapter does."""
    assert finetune(inputs, tmp_path / "adapter").exit_code == 0
    result = run_export(inputs, tmp_path / "adapter", tmp_path / "out", "--format", format)
    assert result.exit_code == 0, result.output
    assert f"{format}, read back; layers differ from the adapters'" in result.output.replace("\n", " ")
    (model, tokenizer), (base, _) = (load_pretrained(inputs / "llama", torch.device("cpu")) for _ in range(2))
    load_adapter(model, tmp_path / "adapter")
    if format == "peft":
        peft = pytest.importorskip("peft")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        again, tokenizer = load_pretrained(tmp_path / "out", torch.device("cpu"))
    x = tokenizer(TEXT, return_tensors="pt").input_ids[:, :32]
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_export_for_servers(inputs, tmp_path, format):
    assert finetune(inputs, tmp_path / "adapter").exit_code == 0
    result = run_export(inputs, tmp_path / "adapter", tmp_path / "out", "--format", format)
    assert result.exit_code == 0, result.output
    assert f"{format}, read back; layers differ from the adapters'" in result.output.replace("\n", " ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert re.search(
        r"demo +Pretrain.*\n +finetune +Fine-tune(.*\n)+ +schema +Print(.*\n)+ +export +Write", result.output
    )


def bits(output):
    """Held-out bits per byte before and after, as printed."""
    return [float(word) for word in re.search(r"held-out text +([\d.]+) +([\d.]+)", output).groups()]


def reload(inputs, output, plan, steps=12):
    model, tokenizer = load_pretrained(inputs / "llama", torch.device("cpu"))
    again = Arm.prepare(plan, Recipe(steps, 1e-2), model, seed=5)
    again.adapters.load(output)
    return again, tokenizer


@pytest.mark.parametrize("method", [LEARNED, FIXED, SINC])
def test_finetune_learns_and_leaves_an_adapter_a_table_and_a_heatmap(inputs, tmp_path, monkeypatch, method):
    trained, train = [], Arm.train
    monkeypatch.setattr(Arm, "train", lambda *args: (trained.append(args[0]), train(*args)))
    output = tmp_path / "adapter"
    result = finetune(inputs, output, *method, "--steps", "30", "--lr", "3e-2")
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = bits(result.output)
    assert after < 0.8 * before
    assert re.search(r"PASS +\S*adapter loaded into a fresh copy of the model", result.output.replace("\n", ""))

    stable = "stable-" if method is SINC else ""
    assert (output / f"{stable}ranks.png").read_bytes().startswith(b"\x89PNG")
    assert ("Stable ranks of" if stable else "Ranks of") in (output / "ranks.txt").read_text()
    again, tokenizer = reload(inputs, output, trained[0].plan, steps=30)
    assert again.rank_by_layer == pytest.approx(trained[0].rank_by_layer, rel=1e-2)
    assert ("stable rank min/avg/max" in result.output) == (method is SINC)
    assert sum(again.ranks) == 2 * 14
    tokens = encode(tokenizer, [TEXT[:200]]).tokens[None, :40]
    with torch.no_grad():
        expected = trained[0].model.eval()(input_ids=tokens).logits
        assert torch.equal(again.model.eval()(input_ids=tokens).logits, expected)


def refuse(adapters, directory):
    raise ValueError("the file is damaged")


@pytest.mark.parametrize(
    "load, words",
    [
        (forget, "1 of 1 checks failed, see FAIL above: do not use"),
        (refuse, "adapter was written, but cannot be loaded: the file is damaged"),
    ],
)
def test_finetune_fails_if_the_adapter_does_not_come_back(inputs, tmp_path, monkeypatch, load, words):
    monkeypatch.setattr("lrlora_ops.Adapters.load", load)
    result = finetune(inputs, tmp_path / "adapter")
    assert_one_line(result, words, code=1)
    assert ("FAIL" in result.output) == (load is forget)
    assert "PASS" not in result.output


def test_finetune_frees_the_trained_model_before_it_loads_a_copy(inputs, tmp_path, monkeypatch):
    loaded, still_there = [], []

    def load(*args):
        still_there.append(any(model() is not None for model in loaded))
        model, tokenizer = load_pretrained(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr("lrlora_ops.finetune.own_text.load_pretrained", load)
    assert finetune(inputs, tmp_path / "adapter").exit_code == 0
    assert still_there == [False, False]


def test_finetune_takes_several_files_and_targets(inputs, tmp_path):
    options = [str(inputs / "latin-1"), "--targets", "q_proj", "--targets", "*.mlp.*"]
    assert_one_line(finetune(inputs, tmp_path / "a", *options), "latin-1 is not UTF-8")  # so it was read
    options[0] = str(inputs / "short")
    result = finetune(inputs, tmp_path / "a", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    modules = json.loads((tmp_path / "a" / "lrlora_state.json").read_text())["modules"]
    assert {name.rsplit(".", 1)[1] for name in modules} == {"q_proj", "gate_proj", "up_proj", "down_proj"}


def test_finetune_adapts_experts_and_shows_where_the_text_goes(inputs, tmp_path):
    result = finetune(inputs, tmp_path / "a", "--targets", "experts", model="qwen3_moe")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "PASS" in result.output
    ranks = (tmp_path / "a" / "ranks.txt").read_text()
    assert "rank, mean 2.0" in ranks and "% of rows, held-out text" in ranks
    assert (tmp_path / "a" / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a" / "ranks.png").exists()


def test_a_missing_extra_is_one_line_that_names_it():
    code = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hide = lambda name, *args: None if name in ("typer", "matplotlib") else find_spec(name, *args)
PathFinder.find_spec = staticmethod(hide)  # some libraries ask an instance of it
from lrlora_ops.cli import main
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "lrlora needs typer, matplotlib, not installed here: pip install 'lrlora_ops[cli]'\n"


def test_bench_prints_the_table_of_a_results_file(capfd):
    file = ROOT / "benchmarks" / "results" / "intel-r-xeon-r-processor-2-50ghz.json"
    assert CliRunner().invoke(app, ["bench", "--table", str(file)]).exit_code == 0
    assert "8B q_proj 1024x4096x4096 fp32 r16, forward+backward" in capfd.readouterr().out
    assert CliRunner().invoke(app, ["bench", "--table", "pyproject.toml"]).exit_code == 2
    assert "pyproject.toml is not a results file" in capfd.readouterr().err
