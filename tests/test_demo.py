"""lrlora demo: what it compares, what it prints, what its checks catch."""

import io
import math
import re
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner

from lrlora_ops import Adapters, FixedRank
from lrlora_ops.cli import app
from lrlora_ops.finetune import demo as demo_module
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import growth_keeps_output, print_checks, same_budget
from lrlora_ops.finetune.controls import on_wrong_experts
from lrlora_ops.finetune.demo import DemoSettings, check, fine_tune, run_demo
from lrlora_ops.finetune.errors import CheckFailed
from lrlora_ops.finetune.experiments import dense, growing_ranks, mixture_of_experts
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.finetune.speed import seconds_per_step
from lrlora_ops.finetune.tokens import encode
from lrlora_ops.finetune.trainer import Recipe
from tests._cli import TEXT, assert_one_line, forget, llama, qwen3_moe

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
    with patch.object(demo_module, "seconds_per_step", partial(seconds_per_step, steps=1)):
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
    assert printed.count("PASS") == 4 and "FAIL" not in printed
    for words in (
        "torch 2",
        "sha256",
        "predicted",
        "· ranks 4/4.0/4",
        "· stable ranks 1.",
        "tokens/s",
        "bits per byte",
        "LearnedRank against FixedRank",
        "SincUpdate against FixedRank",
        "FixedRank, LearnedRank, SincUpdate: 43,008 adapter parameters each, and 9 coefficients of SincUpdate",
        "FixedRank, LearnedRank, SincUpdate: ranks that sum to 112 each",
        "Stable ranks of SincUpdate",
        "seconds",
        "peak memory",
    ):
        assert words in printed
    for text in ("library source", r"reference text \(near\)", r"Unicode lines \(far\)"):
        assert re.search(rf"{text} +\d\.\d+ +\d\.\d+ +\d\.\d+ +\d\.\d+", printed)
    assert row(printed, "adapter parameters") == ["43,008", "43,008", "43,017"]
    assert len(row(printed, "stable rank min/avg/max")) == 1  # SincUpdate's
    assert {path.name for path in output.iterdir()} == {"base", "adapters", "ranks.png", "stable-ranks.png"}


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
        ([], [0], 3.25, 3, 0),
        (["--full"], [0, 1, 2], math.inf, 3, 2),
        (["--full", "--seeds", "7", "--minutes", "9"], [7], 9, 3, 2),
        (["--dense"], [0], 3.25, 3, 0),
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
    settings = DemoSettings(output=tmp_path, **SHORT)
    experiment = dense(seed=0)
    two = replace(experiment, plans=experiment.plans[:2])
    arms = fine_tune(base, texts, two, TEN_STEPS, settings, console, {})
    assert all(same_budget(arms).values())
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


@pytest.mark.parametrize("options, words", [(["--minutes", "0"], "--minutes is 0"), (["--device", "abacus"], "abacus")])
def test_demo_refuses_bad_options(tmp_path, options, words):
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo"), *options])
    assert_one_line(result, words)
