"""The lrlora command: errors of one line that say what to do, real runs on small models, what they leave behind."""

import io
import json
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lrlora_ops import FixedRank, LearnedRank
from lrlora_ops.cli import app
from lrlora_ops.finetune import arm as arm_module
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import print_checks, same_budget
from lrlora_ops.finetune.demo import DemoSettings, fine_tune, run_demo, save_and_reload
from lrlora_ops.finetune.errors import CheckFailed
from lrlora_ops.finetune.experiments import dense, mixture_of_experts
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


def assert_one_line(result, words, code=2):
    """One line on stderr with these words, this exit code, and no traceback."""
    assert result.exit_code == code, (result.output, result.exception)
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("finetune --rank abc", r"Invalid value for '--rank'.* \(see lrlora finetune --help\)"),
        ("finetune --method abacus", r"Invalid value for '--method'.*learned.*\(see lrlora finetune --help\)"),
        ("finetune --no-such-option", r"No such option: --no-such-option.*\(see lrlora finetune --help\)"),
        ("finetune --train text", r"Missing option '--model'.*\(see lrlora finetune --help\)"),
        ("finetune --model", r"'--model' requires an argument.*\(see lrlora --help\)"),  # told before any command
        ("demo --seed 1.5", r"Invalid value for '--seed'.*\(see lrlora demo --help\)"),
        ("demo extra", r"unexpected extra argument.*extra.*\(see lrlora demo --help\)"),
        ("--rank 8", r"No such option: --rank.*\(see lrlora --help\)"),
        ("dmo", r"No such command 'dmo'.*\(see lrlora --help\)"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words):
    assert_one_line(CliRunner().invoke(app, arguments.split()), words)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert re.search(r"demo +Pretrain.*\n +finetune +Fine-tune", result.output)


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


def reload(inputs, output, plan, steps=12):
    model, tokenizer = load_pretrained(inputs / "llama", torch.device("cpu"))
    again = Arm.prepare(plan, Recipe(steps, 1e-2), model, seed=5)
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
    assert re.search(r"PASS +\S*adapter loaded into a fresh copy of the model", result.output.replace("\n", ""))

    assert (output / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "q" in (output / "ranks.txt").read_text()
    again, tokenizer = reload(inputs, output, trained[0].plan, steps=30)
    assert again.rank_by_layer == trained[0].rank_by_layer
    assert sum(again.ranks) == 2 * 14
    tokens = encode(tokenizer, [TEXT[:200]]).tokens[None, :40]
    with torch.no_grad():
        expected = trained[0].model.eval()(input_ids=tokens).logits
        assert torch.equal(again.model.eval()(input_ids=tokens).logits, expected)


def forget(adapters, directory):
    """Stands in for a load that does nothing."""


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
    again, _ = reload(inputs, tmp_path / "adapter", ArmPlan("", lambda steps: LearnedRank(2.0, 8, steps)))
    assert any(parameter.abs().sum() > 0 for name, parameter in again.adapters.named_parameters() if "lora_B" in name)


def test_a_missing_extra_is_one_line_that_names_it():
    code = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name in ("typer", "matplotlib") else find_spec(name, *args)
from lrlora_ops.cli import main
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "lrlora needs typer, matplotlib, not installed here: pip install 'lrlora_ops[cli]'\n"


SHORT = {"minutes": 5, "device": "cpu", "characters": 60_000, "held_out_characters": 1_000}
TEN_STEPS = Recipe(10, 8e-3)  # fewer are never run


def tiny(experiment):
    """The same with ten steps of each training."""
    pretraining = replace(experiment.pretraining, steps=TEN_STEPS.steps)
    return replace(experiment, pretraining=pretraining, fine_tuning=TEN_STEPS)


def run(experiment, output):
    """What a short demo prints; it raises if a check fails."""
    threads = torch.get_num_threads()
    console = Console(record=True, width=120, file=io.StringIO())
    run_demo(tiny(experiment), DemoSettings(output=output, **SHORT), console)
    torch.set_num_threads(threads)
    return console.export_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short dense demo: its output directory, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    return output, run(dense(seed=0), output)


def test_demo_shows_what_was_promised_and_passes(demo):
    output, printed = demo
    assert printed.count("PASS") == 3 and "FAIL" not in printed
    for words in (
        "torch 2",
        "sha256",
        "predicted",
        "ranks 4/4.0/4",
        "tokens/s",
        "bits per byte",
        "LearnedRank against FixedRank",
        "FixedRank, LearnedRank: 43,008 adapter parameters each",
        "FixedRank, LearnedRank: ranks that sum to 112 each",
        "seconds",
        "peak memory",
    ):
        assert words in printed
    for text in ("library source", r"reference text \(near\)", r"Unicode lines \(far\)"):
        assert re.search(rf"{text} +\d\.\d+ +\d\.\d+ +\d\.\d+", printed)
    assert {path.name for path in output.iterdir()} == {"base", "adapter", "ranks.png"}


def test_demo_runs_any_arms_on_a_mixture_of_experts(tmp_path):
    plans = (
        ArmPlan("queries and keys", lambda _: FixedRank(4), ["q_proj", "k_proj"]),
        ArmPlan("values", lambda steps: LearnedRank(8, 16, steps), "v_proj"),
    )
    printed = run(mixture_of_experts(plans), tmp_path)
    assert printed.count("PASS") == 3
    assert "queries and keys, values: ranks that sum to 32 each" in printed
    assert "values against queries and keys" in printed
    assert AutoConfig.from_pretrained(tmp_path / "base").model_type == "qwen3_moe"


def test_demo_fails_if_the_adapter_does_not_come_back(demo, monkeypatch, tmp_path):
    base = demo[0] / "base"
    text = encode(load_pretrained(base, torch.device("cpu"))[1], [TEXT[:1000]])
    texts = Texts([(text.tokens, 2)], {"text": text}, seq_len=32)
    console = Console(quiet=True)
    arms = fine_tune(base, texts, dense(seed=0), TEN_STEPS, DemoSettings(**SHORT), console)
    assert all(same_budget(arms).values())
    print_checks(console, save_and_reload(arms[1], base, texts, tmp_path))
    monkeypatch.setattr("lrlora_ops.Adapters.load", forget)
    with pytest.raises(CheckFailed, match="1 of 1 checks failed"):
        print_checks(console, save_and_reload(arms[1], base, texts, tmp_path))


def test_arms_of_unequal_budgets_fail_the_check():
    plans = [ArmPlan(name, lambda _, rank=rank: FixedRank(rank)) for name, rank in (("two", 2), ("three", 3))]
    arms = [Arm.prepare(plan, TEN_STEPS, llama(), seed=0) for plan in plans]
    assert not any(same_budget(arms).values())


def test_a_demo_whose_checks_fail_is_one_line_and_exit_code_1(monkeypatch):
    def fail(*_):
        raise CheckFailed("1 of 3 checks failed")

    monkeypatch.setattr("lrlora_ops.finetune.demo.run_demo", fail)
    assert_one_line(CliRunner().invoke(app, ["demo"]), "1 of 3 checks failed", code=1)
