"""The lrlora command: errors of one line that say what to do, real runs on small models, what they leave behind."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lrlora_ops import LearnedRank
from lrlora_ops.cli import app
from lrlora_ops.finetune import arm as arm_module
from lrlora_ops.finetune.arm import Arm, Texts
from lrlora_ops.finetune.demo import DemoSettings, check, fine_tune, run_demo
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.finetune.tokens import encode, train_tokenizer
from lrlora_ops.finetune.trainer import Recipe

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {index}: the ranks of {index % 7} layers are learned\n" for index in range(200))
SMALL = ["--steps", "12", "--batch-size", "4", "--seq-len", "16", "--lr", "1e-2", "--rank", "2", "--device", "cpu"]


TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, initializer_range=0.3, **sizes, **TOKENS))


def gpt2_without_linear_layers():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **TOKENS))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory of models and files, good and bad."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer([TEXT], 300)
    for name, model in (
        ("llama", llama()),
        ("gpt2", gpt2_without_linear_layers()),
        ("half", llama().half()),
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
    command = ["finetune", "--model", inputs / model, "--train", inputs / train, "--output", output, *SMALL, *options]
    return CliRunner().invoke(app, [str(word) for word in command])


def assert_one_line(result, words):
    """One line on stderr with these words, exit code 2, and no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lrlora: ")
    assert re.search(words, lines[0]), lines[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "nowhere"}, "nowhere is no directory: give one that holds a Hugging Face model"),
        ({"model": "text"}, "text is no directory"),
        ({"model": "no-model"}, r"no-model has no config\.json"),
        ({"model": "damaged"}, "damaged cannot be loaded as a causal language model"),
        ({"model": "vision"}, "vision cannot be loaded as a causal language model"),
        ({"model": "gpt2"}, "'all-linear' matches no linear layer"),
        ({"model": "half"}, "float16.*add --dtype bfloat16"),
        ({"train": "nowhere"}, r"nowhere cannot be read \(No such file or directory\): give text files"),
        ({"train": "occupied"}, r"occupied cannot be read \(Is a directory\)"),
        ({"train": "empty"}, "empty is empty: leave it out"),
        ({"train": "binary"}, "binary is a binary file"),
        ({"train": "latin-1"}, "latin-1 is not UTF-8 text: convert it"),
        ({"train": "short"}, "too short: .* add text, or lower --seq-len"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, changes, words):
    assert_one_line(finetune(inputs, tmp_path / "adapter", **changes), words)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rank", "0"], "--rank is 0.0; it must be above 0"),
        (["--rank", "nan"], "--rank is nan"),
        (["--method", "fixed", "--rank", "2.5"], "--rank is 2.5; it must be a whole number with --method fixed"),
        (["--method", "fixed", "--max-rank", "8"], "--max-rank is 8; it must be left out"),
        (["--max-rank", "1"], "--max-rank is 1; it must be at least the rank, 2"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--batch-size", "-3"], "--batch-size is -3; it must be at least 1"),
        (["--seq-len", "1"], "--seq-len is 1; it must be at least 2"),
        (["--seq-len", "65"], "--seq-len is 65, but the model reads at most 64 tokens: lower it"),
        (["--lr", "nan"], "--lr is nan; it must be above 0"),
        (["--lr", "1e30"], "the loss is .* lower the learning rate"),
        (["--eval-fraction", "1"], "--eval-fraction is 1.0; it must be between 0 and 1"),
        (["--device", "abacus"], "--device abacus is not usable here; choose auto or one of: cpu"),
        (["--targets", "no_such_proj"], "'no_such_proj' matches no linear layer.*q_proj"),
    ],
)
def test_bad_option_is_one_line(inputs, tmp_path, options, words):
    assert_one_line(finetune(inputs, tmp_path / "adapter", *options), words)


def test_output_is_refused_before_any_training_if_it_cannot_be_written(inputs, tmp_path):
    assert_one_line(finetune(inputs, inputs / "text" / "adapter"), r"cannot be written \(Not a directory\)")
    assert_one_line(finetune(inputs, inputs / "occupied"), "occupied is not empty: choose another --output")
    assert (inputs / "occupied" / "thesis").read_text() == "do not touch"


@pytest.mark.parametrize("options, words", [(["--minutes", "0"], "--minutes is 0"), (["--device", "abacus"], "abacus")])
def test_demo_refuses_bad_options(tmp_path, options, words):
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo"), *options])
    assert_one_line(result, words)


def bits(output):
    """Held-out bits per byte before and after, as printed."""
    return [float(word) for word in re.search(r"held-out text +([\d.]+) +([\d.]+)", output).groups()]


def reload(inputs, output, method):
    model, tokenizer = load_pretrained(inputs / "llama", torch.device("cpu"))
    again = Arm.prepare(model, method, "all-linear", seed=5)
    again.adapters.load(output)
    return again, tokenizer


@pytest.mark.parametrize("name", ["learned", "fixed"])
def test_finetune_learns_and_leaves_an_adapter_a_table_and_a_heatmap(inputs, tmp_path, monkeypatch, name):
    trained, train = [], Arm.train
    monkeypatch.setattr(Arm, "train", lambda *args: (trained.append(args[0]), train(*args)))
    output = tmp_path / "adapter"
    result = finetune(inputs, output, "--method", name, "--steps", "30", "--lr", "3e-2")
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = bits(result.output)
    assert after < 0.8 * before

    assert (output / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "q" in (output / "ranks.txt").read_text()
    again, tokenizer = reload(inputs, output, trained[0].method)
    assert again.ranks == trained[0].ranks
    assert sum(again.ranks.values()) == 2 * 14
    tokens = encode(tokenizer, [TEXT[:200]]).tokens[None, :40]
    with torch.no_grad():
        expected = trained[0].model.eval()(input_ids=tokens).logits
        assert torch.equal(again.model.eval()(input_ids=tokens).logits, expected)


def test_finetune_takes_several_files_and_targets(inputs, tmp_path):
    options = [str(inputs / "latin-1"), "--targets", "q_proj", "--targets", "*.mlp.*"]
    assert_one_line(finetune(inputs, tmp_path / "a", *options), "latin-1 is not UTF-8")  # so it was read
    options[0] = str(inputs / "short")
    result = finetune(inputs, tmp_path / "a", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    modules = json.loads((tmp_path / "a" / "lrlora_state.json").read_text())["modules"]
    assert {name.rsplit(".", 1)[1] for name in modules} == {"q_proj", "gate_proj", "up_proj", "down_proj"}


def test_finetune_that_is_interrupted_saves_the_adapter_and_says_where(inputs, tmp_path, monkeypatch):
    batches = arm_module.batches

    def stopped(*args):
        stream = batches(*args)
        yield from (next(stream) for _ in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(arm_module, "batches", stopped)
    result = finetune(inputs, tmp_path / "adapter", "--method", "learned")
    assert result.exit_code == 130
    assert "interrupted" in result.output and "adapter" in result.output
    again, _ = reload(inputs, tmp_path / "adapter", LearnedRank(2.0, 8, 12))
    assert any(parameter.abs().sum() > 0 for name, parameter in again.adapters.named_parameters() if "lora_B" in name)


def test_a_missing_extra_is_one_line_that_names_it():
    code = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name in ("typer", "matplotlib") else find_spec(name, *args)
import lrlora_ops.cli
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "lrlora needs typer, matplotlib, not installed here: pip install 'lrlora_ops[cli]'\n"


TINY = DemoSettings(
    minutes=5,
    device="cpu",
    mean_rank=2,
    max_rank=8,
    pretraining=Recipe(10, 4e-3),
    fine_tuning=Recipe(10, 8e-3),  # fewer are never run
    characters=60_000,
    held_out_characters=1_000,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demo: its output directory, what it printed, and whether it passed."""
    settings = replace(TINY, output=tmp_path_factory.mktemp("demo"))
    threads = torch.get_num_threads()
    console = Console(record=True, width=120, file=io.StringIO())
    passed = run_demo(settings, console)
    torch.set_num_threads(threads)
    return settings, console.export_text(), passed


def test_demo_shows_what_was_promised_and_passes(demo):
    settings, printed, passed = demo
    assert passed
    assert printed.count("PASS") == 3 and "FAIL" not in printed
    for words in (
        "torch 2",
        "sha256",
        "predicted",
        "ranks 2/2.0/2",
        "tokens/s",
        "bits per byte",
        "seconds",
        "peak memory",
    ):
        assert words in printed
    for text in ("library source", "reference text", "Unicode lines"):
        assert re.search(rf"{text} +\d\.\d+ +\d\.\d+ +\d\.\d+", printed)
    assert {path.name for path in settings.output.iterdir()} == {"base", "adapter", "ranks.png"}


def test_demo_fails_if_the_adapter_does_not_come_back(demo, monkeypatch, tmp_path):
    settings, base = replace(demo[0], output=tmp_path), demo[0].output / "base"
    tokenizer = load_pretrained(base, torch.device("cpu"))[1]
    text = encode(tokenizer, [TEXT[:1000]])
    texts = Texts([(text.tokens, 2)], {"text": text}, seq_len=32)
    fixed, learned = fine_tune(base, texts, TINY.fine_tuning, settings, Console(quiet=True))
    console = Console(record=True, file=io.StringIO())
    assert check(fixed, learned, texts, base, settings, console)
    monkeypatch.setattr("lrlora_ops.Adapters.load", lambda *_: None)
    assert not check(fixed, learned, texts, base, settings, console)
    assert "FAIL" in console.export_text()


@pytest.mark.parametrize("passed, code", [(True, 0), (False, 1)])
def test_demo_exit_code_says_whether_it_passed(monkeypatch, passed, code):
    monkeypatch.setattr("lrlora_ops.finetune.demo.run_demo", lambda *_: passed)
    assert CliRunner().invoke(app, ["demo"]).exit_code == code
