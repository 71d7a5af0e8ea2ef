"""The lrlora command: errors of one line that say what to do, real runs on small models, what they leave behind."""

import io
import json
import math
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
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from lrlora_ops import Adapters, FixedRank, LearnedRank
from lrlora_ops.cli import app
from lrlora_ops.finetune import arm as arm_module
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import growth_keeps_output, print_checks, same_budget
from lrlora_ops.finetune.controls import on_wrong_experts
from lrlora_ops.finetune.demo import DemoSettings, check, fine_tune, run_demo
from lrlora_ops.finetune.errors import CheckFailed
from lrlora_ops.finetune.experiments import dense, growing_ranks, mixture_of_experts
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


def qwen3_moe():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(max_position_embeddings=64, initializer_range=0.3, **sizes, **experts, **TOKENS)
    )


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
        ("demo --seeds 1.5", r"Invalid value for '--seeds'.*\(see lrlora demo --help\)"),
        ("demo --seeds 1 2.5", r"Invalid value for '--seeds'.*2.5.*\(see lrlora demo --help\)"),
        ("demo --seeds 1 2 1", r"--seeds has 1, 2, 1; leave out what is there twice"),
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


def test_finetune_adapts_experts_and_shows_where_the_text_goes(inputs, tmp_path):
    result = finetune(inputs, tmp_path / "a", "--targets", "experts", model="qwen3_moe")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "PASS" in result.output
    ranks = (tmp_path / "a" / "ranks.txt").read_text()
    assert "rank, mean 2.0" in ranks and "% of rows, held-out text" in ranks
    assert (tmp_path / "a" / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a" / "ranks.png").exists()


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
    assert {path.name for path in output.iterdir()} == {"base", "adapters", "ranks.png"}


@pytest.fixture(scope="module")
def moe_demo(tmp_path_factory):
    """A short demo of a Mixture-of-Experts with its controls: its output directory, and what it printed."""
    output = tmp_path_factory.mktemp("moe-demo")
    return output, run(mixture_of_experts(seed=0, controls=True), output)


def row(printed, name):
    """The cells of a row of the table of results."""
    return re.search(rf"^ *{name} {{2,}}(.*?) *$", printed, re.MULTILINE).group(1).split()


def test_moe_demo_compares_equal_budgets_and_passes(moe_demo):
    output, printed = moe_demo
    arms = "uniform 8, DR-LoRA, LearnedRank"
    assert printed.count("PASS") == 5 and "FAIL" not in printed
    for words in (
        f"PASS  {arms}: 278,528 adapter parameters each",
        f"PASS  {arms}: ranks that sum to 512 each",
        "PASS  DR-LoRA: output bit-identical across a growth by",
        "adapters/DR-LoRA loaded into a fresh copy of the model gives the same bits per byte",
        "adapters/LearnedRank loaded into a fresh copy of the model gives the same bits per byte",
        "LearnedRank against uniform 8, in bits per byte",
        "peak memory",
    ):
        assert words in printed
    budget = "278,528"
    assert row(printed, "adapter parameters") == [budget, budget, budget, "557,056", budget]
    assert row(printed, "sum of ranks") == ["512", "512", "512", "1,024", "512"]
    for text in ("library source", r"reference text \(near\)", r"Unicode lines \(far\)"):
        assert len([float(cell) for cell in row(printed, text)]) == 6
    assert AutoConfig.from_pretrained(output / "base").model_type == "qwen3_moe"
    assert {path.name for path in output.iterdir()} == {"base", "adapters", "experts.png"}


def test_moe_demo_prints_ranks_and_routing_by_layer_and_expert(moe_demo):
    """All blocks have a row for each layer, and the token-weighted ranks of the table are those of the blocks."""
    _, printed = moe_demo
    blocks = re.findall(r"^(rank|% of rows)(.*)\nlayer.*\n((?: +\d.*\n){4})", printed, re.MULTILINE)
    assert [kind for kind, *_ in blocks] == ["rank", "% of rows", "% of rows"] * 2
    sums = []
    for *_, lines in blocks:
        rows = [[int(cell) for cell in line.split()] for line in lines.splitlines()]
        assert [(layer, len(cells)) for layer, *cells in rows] == [(layer, 16) for layer in range(4)]
        sums.append([sum(cells) for _, *cells in rows])
    assert sums[0] == [128] * 4  # DR-LoRA shares out the ranks of each layer, LearnedRank those of all
    assert sum(sums[3]) == 512
    assert all(abs(total - 100) <= 8 for block in (*sums[1:3], *sums[4:]) for total in block)  # rounded
    weighted = [float(cell) for cell in row(printed, "token-weighted rank")]
    assert (weighted[0], weighted[3]) == (8.0, 16.0)
    for arm, titles in ((1, blocks[1:3]), (2, blocks[4:6])):
        means = [float(title.split()[-1]) for _, title, _ in titles]
        assert weighted[arm] == pytest.approx(sum(means) / 2, abs=0.11)


def test_permuted_ranks_are_those_of_the_arm_on_other_experts():
    model = qwen3_moe()
    arm = Arm.prepare(ArmPlan("first", lambda _: FixedRank(6), "experts"), TEN_STEPS, model, seed=0)
    given = [[0, 1, 2, 5], [6, 0, 0, 2]]
    for module, ranks in zip(arm.adapters.modules.values(), given, strict=True):
        module.set_ranks(ranks)
    again = Arm.prepare(on_wrong_experts("permuted", arm, seed=0), TEN_STEPS, qwen3_moe(), seed=0)
    permuted = [ranks.tolist() for ranks in again.expert_ranks.values()]
    assert permuted != given
    assert [sorted(ranks) for ranks in permuted] == [sorted(ranks) for ranks in given]
    assert again.parameters == arm.parameters * 2 // 6  # a pool of 2 per expert holds the 8 of the fuller layer


def test_seeds_are_runs_of_their_own_with_a_table_of_means(tmp_path, monkeypatch):
    ran = []

    def run_one(experiment, settings, console):
        ran.append((experiment, settings.seed, settings.output.name))
        return {arm: {"near": settings.seed + offset} for arm, offset in (("before", 2.0), ("DR-LoRA", 1.0))}

    monkeypatch.setattr("lrlora_ops.finetune.seeds.run_demo", run_one)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--dense", "--seeds", "0", "1", "5"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert [seed_and_directory for _, *seed_and_directory in ran] == [[0, "seed-0"], [1, "seed-1"], [5, "seed-5"]]
    assert row(result.output, "before") == ["4.000", "2.000", "3.000", "7.000"]
    assert row(result.output, "DR-LoRA") == ["3.000", "1.000", "2.000", "6.000"]


@pytest.mark.parametrize(
    "options, seeds, minutes, arms, controls",
    [
        ([], [0], 3.5, 3, 0),
        (["--full"], [0, 1, 2], math.inf, 3, 2),
        (["--full", "--seeds", "7", "--minutes", "9"], [7], 9, 3, 2),
        (["--dense"], [0], 3.5, 2, 0),
    ],
)
def test_demo_options_choose_the_experiment(tmp_path, monkeypatch, options, seeds, minutes, arms, controls):
    chosen = []
    monkeypatch.setattr("lrlora_ops.finetune.seeds.run_seeds", lambda *args: chosen.append(args))
    assert CliRunner().invoke(app, ["demo", "--output", str(tmp_path), *options]).exit_code == 0
    experiment, run_with, settings, _ = chosen[0]
    assert (run_with, settings.minutes) == (seeds, minutes)
    assert (len(experiment(0).plans), len(experiment(0).controls)) == (arms, controls)


def test_growth_that_changes_the_output_fails_the_check(monkeypatch):
    plan = ArmPlan("growing", growing_ranks, "experts")
    stream = torch.randint(300, (400,), generator=torch.Generator().manual_seed(0))
    texts = Texts([(stream, 2)], {}, seq_len=16)
    recipe = Recipe(40, 1e-2)
    assert all(growth_keeps_output(plan, recipe, qwen3_moe(), texts, seed=0).values())

    def step_on(adapters, loss=None, step=Adapters.step):
        step(adapters, loss)
        for parameter in adapters.parameters():
            parameter.data.add_(0.01)

    monkeypatch.setattr("lrlora_ops.Adapters.step", step_on)
    assert not any(growth_keeps_output(plan, recipe, qwen3_moe(), texts, seed=0).values())


def test_ranks_that_never_grow_fail_the_check_of_growth():
    texts = Texts([(torch.arange(100), 2)], {}, seq_len=16)
    plan = ArmPlan("fixed", lambda _: FixedRank(2), "experts")
    assert not any(growth_keeps_output(plan, Recipe(3, 1e-2), qwen3_moe(), texts, seed=0).values())


def test_demo_fails_if_the_adapter_does_not_come_back(demo, monkeypatch, tmp_path):
    base = demo[0] / "base"
    text = encode(load_pretrained(base, torch.device("cpu"))[1], [TEXT[:1000]])
    texts = Texts([(text.tokens, 2)], {"text": text}, seq_len=32)
    console = Console(quiet=True)
    arms = fine_tune(base, texts, dense(seed=0), TEN_STEPS, DemoSettings(**SHORT), console)
    assert all(same_budget(arms).values())
    settings = DemoSettings(output=tmp_path, **SHORT)
    print_checks(console, check(arms, base, texts, settings))
    monkeypatch.setattr("lrlora_ops.Adapters.load", forget)
    with pytest.raises(CheckFailed, match="1 of 3 checks failed"):
        print_checks(console, check(arms, base, texts, settings))


def test_arms_of_unequal_budgets_fail_the_check():
    plans = [ArmPlan(name, lambda _, rank=rank: FixedRank(rank)) for name, rank in (("two", 2), ("three", 3))]
    arms = [Arm.prepare(plan, TEN_STEPS, llama(), seed=0) for plan in plans]
    assert not any(same_budget(arms).values())


def test_a_demo_whose_checks_fail_is_one_line_and_exit_code_1(monkeypatch):
    def fail(*_):
        raise CheckFailed("1 of 3 checks failed")

    monkeypatch.setattr("lrlora_ops.finetune.seeds.run_demo", fail)
    assert_one_line(CliRunner().invoke(app, ["demo"]), "1 of 3 checks failed", code=1)
