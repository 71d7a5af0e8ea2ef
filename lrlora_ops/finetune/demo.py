"""The demo: pretrain a small language model on Python's library, then fine-tune it with fixed and learned ranks."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lrlora_ops import FixedRank, LearnedRank
from lrlora_ops.finetune.arm import Arm, Texts
from lrlora_ops.finetune.base_model import DemoTexts, read_texts, small_llama
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.machine import describe, peak_memory, pick_device
from lrlora_ops.finetune.outcome import print_comparison, print_ranks, print_results
from lrlora_ops.finetune.pretrained import load_pretrained, quiet_transformers
from lrlora_ops.finetune.progress import training_progress
from lrlora_ops.finetune.speed import OPTIMIZER_SHARE, Costs, choose_threads, seconds_per_step
from lrlora_ops.finetune.tokens import batches
from lrlora_ops.finetune.trainer import Recipe, train
from lrlora_ops.methods import Method
from lrlora_ops.report import heatmap

PRETRAINING_ROWS = 8


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults are what ``lrlora demo`` runs.

    Attributes:
        output: Directory for the model, the adapter and the heatmap; made if need be.
        minutes: Steps are cut on a machine that would need longer.
        seed: Of the weights, the batches and the sampled ranks.
        device: ``auto``, ``cpu``, ``cuda``, ...
        mean_rank: Rank of every layer for FixedRank, and their mean for LearnedRank.
        max_rank: The most that LearnedRank may give a layer.
        freeze: Share of the fine-tuning after which LearnedRank's ranks are final.
        pretraining, fine_tuning: Recipes; both methods have the same.
        characters: How much of each text is encoded to train on.
        held_out_characters: How much of each held-out text is measured on.
    """

    output: Path = Path("lrlora-demo")
    minutes: float = 2.5
    seed: int = 0
    device: str = "auto"
    mean_rank: int = 4
    max_rank: int = 16
    freeze: float = 0.6
    pretraining: Recipe = field(default_factory=lambda: Recipe(500, 4e-3, betas=(0.9, 0.95), weight_decay=0.1))
    fine_tuning: Recipe = field(default_factory=lambda: Recipe(300, 8e-3))
    characters: int = 3_000_000
    held_out_characters: int = 40_000

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise CommandError(f"--minutes is {self.minutes}; it must be above 0")


def run_demo(settings: DemoSettings, console: Console) -> bool:
    """Pretrain, fine-tune with both methods, show, check.

    Returns:
        Whether every check passed.

    Raises:
        CommandError: The device is not there, the output cannot be written, or this Python lacks its library's source.
    """
    start = time.perf_counter()
    deadline = start + 60 * settings.minutes
    device, base = pick_device(settings.device), make_output(settings.output)
    quiet_transformers()
    console.print(describe(device), style="bold", highlight=False)
    texts = read_texts(settings.characters, settings.held_out_characters, console)
    torch.manual_seed(settings.seed)
    model: Any = small_llama()
    model.to(device)

    costs = measure_costs(model, texts, settings, console)
    steps = plan(costs, settings, deadline, console)
    seconds = pretrain(model, texts, replace(settings.pretraining, steps=steps), settings.seed, console)
    model.save_pretrained(base)
    texts.tokenizer.save_pretrained(base)
    before = texts.tuning.measure(model)

    # The machine may have become slower, or faster, since the costs were measured.
    steps = plan_fine_tuning(costs.scaled(seconds / (steps * costs.pretraining)), settings, deadline, console)
    recipe = replace(settings.fine_tuning, steps=steps)
    fixed, learned = fine_tune(base, texts.tuning, recipe, settings, console)

    print_results(console, before, [fixed, learned])
    print_comparison(console, fixed, learned)
    print_ranks(console, learned)
    heatmap(learned.ranks, settings.output / "ranks.png", "LearnedRank: rank by layer and module")
    passed = check(fixed, learned, texts.tuning, base, settings, console)
    console.print(f"  {settings.output}: base/ is the model, adapter/ LearnedRank's adapter, ranks.png its heatmap")
    console.print(f"  {time.perf_counter() - start:.0f} s in all, {peak_memory(device)}")
    return passed


def make_output(directory: Path) -> Path:
    """Make the directory, and return the one in it for the model."""
    base = directory / "base"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{base} cannot be made ({error.strerror}): choose another --output") from None
    return base


def measure_costs(model: nn.Module, texts: DemoTexts, settings: DemoSettings, console: Console) -> Costs:
    """Time a few steps of pretraining and of fine-tuning; on CPU, choose the number of threads by it."""
    device = next(model.parameters()).device
    batch = next(batches([(texts.source, PRETRAINING_ROWS)], texts.tuning.seq_len, 1, settings.seed)).to(device)
    if device.type == "cpu":
        seconds = choose_threads(model, batch)
        times = ", ".join(f"{1e3 * value:.0f} ms with {threads}" for threads, value in seconds.items())
        console.print(f"  a step of {batch.numel():,} tokens takes {times} threads; using {torch.get_num_threads()}")
    step = OPTIMIZER_SHARE * seconds_per_step(model, batch)
    held_out = sum(len(text.tokens) for text in texts.tuning.held_out.values())
    # Four times: the base model, each of two arms, one arm loaded again. A forward pass is a third of a step.
    measuring = 4 * held_out / batch.numel() * step / 3
    arms = 0.0
    for method in methods(settings, settings.fine_tuning.steps):
        trial = Arm.prepare(copy.deepcopy(model), method, "all-linear", settings.seed)
        arms += OPTIMIZER_SHARE * seconds_per_step(trial.model, batch[: texts.tuning.rows])
    return Costs(step, arms, measuring)


def plan(costs: Costs, settings: DemoSettings, deadline: float, console: Console) -> int:
    """Steps of pretraining; says what is to be expected of the whole run."""
    wanted = settings.pretraining.steps, settings.fine_tuning.steps
    steps = costs.fit(*wanted, deadline - time.perf_counter())
    console.print(
        f"  predicted: {costs.total(*steps):.0f} s for {steps[0]} steps of pretraining, 2 x {steps[1]} of fine-tuning, "
        "and measuring"
    )
    say_if_cut("pretraining", steps[0], wanted[0], settings, console)
    return steps[0]


def plan_fine_tuning(costs: Costs, settings: DemoSettings, deadline: float, console: Console) -> int:
    """Steps of each fine-tuning, with what time is left after the pretraining."""
    wanted = settings.fine_tuning.steps
    _, steps = costs.fit(0, wanted, deadline - time.perf_counter())
    say_if_cut("each fine-tuning", steps, wanted, settings, console)
    return steps


def say_if_cut(phase: str, steps: int, wanted: int, settings: DemoSettings, console: Console) -> None:
    """A shorter run is another experiment than the one in the documentation."""
    if steps < wanted:
        console.print(
            f"  slow machine: {phase} is cut from {wanted} to {steps} steps to end within {settings.minutes:g} minutes "
            "(--minutes gives it more)",
            style="yellow",
        )


def pretrain(model: nn.Module, texts: DemoTexts, recipe: Recipe, seed: int, console: Console) -> float:
    """Train the whole model on library source; returns the seconds that it took."""
    start, seq_len = time.perf_counter(), texts.tuning.seq_len
    stream = batches([(texts.source, PRETRAINING_ROWS)], seq_len, recipe.steps, seed)
    with training_progress(console, "pretraining", recipe.steps, PRETRAINING_ROWS * seq_len) as on_step:
        train(model, stream, recipe, on_step)
    return time.perf_counter() - start


def methods(settings: DemoSettings, steps: int) -> list[Method]:
    """The two that are compared, with the same sum of ranks."""
    learned = LearnedRank(
        settings.mean_rank, settings.max_rank, total_steps=steps, freeze=settings.freeze, seed=settings.seed
    )
    return [FixedRank(settings.mean_rank), learned]


def fine_tune(base: Path, texts: Texts, recipe: Recipe, settings: DemoSettings, console: Console) -> list[Arm]:
    """Each method from the same weights, on the same batches."""
    arms = []
    for method in methods(settings, recipe.steps):
        model, _ = load_pretrained(base, pick_device(settings.device))
        arm = Arm.prepare(model, method, "all-linear", settings.seed)
        arm.train(texts, recipe, settings.seed, console)
        arms.append(arm)
    return arms


def check(fixed: Arm, learned: Arm, texts: Texts, base: Path, settings: DemoSettings, console: Console) -> bool:
    """Print PASS or FAIL for what must hold of any run, whatever it came to; returns whether all holds."""
    directory = settings.output / "adapter"
    learned.adapters.save(directory)
    model, _ = load_pretrained(base, pick_device(settings.device))
    reloaded = Arm.prepare(model, learned.method, "all-linear", settings.seed + 1)
    reloaded.adapters.load(directory)
    bits = texts.measure(model)
    ranks, budget = learned.ranks.values(), settings.mean_rank * len(learned.ranks)
    checks = {
        f"both methods train {fixed.parameters:,} adapter parameters": fixed.parameters == learned.parameters,
        f"the learned ranks sum to the budget, {budget}": sum(ranks) == budget,
        f"{directory} loaded into a fresh copy of the model gives the same bits per byte": bits == learned.bits,
    }
    for text, passed in checks.items():
        console.print(f"{'PASS' if passed else 'FAIL'}  {text}", style="green" if passed else "red", highlight=False)
    return all(checks.values())
