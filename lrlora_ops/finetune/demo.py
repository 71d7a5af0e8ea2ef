"""The demo: pretrain a small language model on Python's library, then fine-tune it in several ways and compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from lrlora_ops import DynamicRank
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import comes_back, growth_keeps_output, print_checks, same_budget
from lrlora_ops.finetune.demo_texts import DemoTexts, read_texts
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.experiments import ControlPlan, Experiment
from lrlora_ops.finetune.machine import describe, peak_memory, pick_device
from lrlora_ops.finetune.outcome import draw_ranks, print_comparison, print_ranks, print_results
from lrlora_ops.finetune.pretrained import load_pretrained, quiet_transformers
from lrlora_ops.finetune.progress import training_progress
from lrlora_ops.finetune.speed import OPTIMIZER_SHARE, Costs, Pace, choose_threads, seconds_per_step
from lrlora_ops.finetune.tokens import batches
from lrlora_ops.finetune.trainer import Recipe, train

PRETRAINING_ROWS = 8


@dataclass(frozen=True)
class DemoSettings:
    """Where and for how long the demo runs.

    Attributes:
        output: Directory for the model, the adapters and the heatmap; made if need be.
        minutes: Steps are cut on a machine that would need longer; inf for a run that is never cut.
        seed: Of the weights, the batches and the adapters.
        device: ``auto``, ``cpu``, ``cuda``, ...
        characters: How much of each text is encoded to train on.
        held_out_characters: How much of each held-out text is measured on.
    """

    output: Path = Path("lrlora-demo")
    minutes: float = 3.25
    seed: int = 0
    device: str = "auto"
    characters: int = 3_000_000
    held_out_characters: int = 40_000

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise CommandError(f"--minutes is {self.minutes}; it must be above 0")


Results = dict[str, dict[str, float]]  # held-out bits per byte by text, by arm; before any of them first


def run_demo(experiment: Experiment, settings: DemoSettings, console: Console) -> Results:
    """Pretrain, fine-tune in each way, show, check.

    Raises:
        CommandError: The device is not there, the output cannot be written, or this Python lacks its library's source.
        CheckFailed: What must hold of any run does not.
    """
    start = time.perf_counter()
    deadline = start + 60 * settings.minutes
    device, base = pick_device(settings.device), make_output(settings.output)
    quiet_transformers()
    console.print(describe(device), style="bold", highlight=False)
    texts = read_texts(settings.characters, settings.held_out_characters, experiment.tuning_rows, console)
    torch.manual_seed(settings.seed)
    model: Any = AutoModelForCausalLM.from_config(experiment.config).to(device)

    costs = measure_costs(model, texts, experiment, settings.seed, console)
    recipe = plan_pretraining(costs, experiment, settings, deadline, console)
    pace = Pace(costs, (experiment.pretraining.steps, experiment.fine_tuning.steps), deadline)
    pretrain(model, texts, recipe, pace, settings.seed, console)
    model.save_pretrained(base)
    texts.tokenizer.save_pretrained(base)
    before = texts.tuning.measure(model)

    recipe = plan_fine_tuning(costs.scaled(pace.slowness), experiment, settings, deadline, console)
    arms = fine_tune(base, texts.tuning, experiment, recipe, settings, console, before)

    print_results(console, before, arms)
    print_comparison(console, arms[0], arms[1:])
    planned = arms[: len(experiment.plans)]
    for arm in planned[1:]:
        print_ranks(console, arm)
    pictures = draw_ranks(planned[1:], settings.output)
    print_checks(console, check(planned, base, texts.tuning, settings))
    names = ", ".join(picture.name for picture in pictures)
    console.print(f"  {settings.output}: base/ is the model, adapters/ what was trained; heatmaps: {names}")
    console.print(f"  where the rank went: lrlora report {settings.output}", highlight=False, soft_wrap=True)
    console.print(f"  {time.perf_counter() - start:.0f} s in all, {peak_memory(device)}")
    return {"before": before, **{arm.plan.name: arm.bits for arm in arms}}


def make_output(directory: Path) -> Path:
    """Make the directory, and return the one in it for the model."""
    base = directory / "base"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{base} cannot be made ({error.strerror}): choose another --output") from None
    return base


def measure_costs(model: nn.Module, texts: DemoTexts, experiment: Experiment, seed: int, console: Console) -> Costs:
    """Time a few steps of pretraining and of fine-tuning; on CPU, choose the number of threads by it."""
    device, balance = next(model.parameters()).device, experiment.pretraining.balance
    batch = next(batches([(texts.source, PRETRAINING_ROWS)], texts.tuning.seq_len, 1, seed)).to(device)
    if device.type == "cpu":
        seconds = choose_threads(model, batch, balance)
        times = ", ".join(f"{1e3 * value:.0f} ms with {threads}" for threads, value in seconds.items())
        console.print(f"  a step of {batch.numel():,} tokens takes {times} threads; using {torch.get_num_threads()}")
    step = OPTIMIZER_SHARE * seconds_per_step(model, batch, balance)
    held_out = sum(len(text.tokens) for text in texts.tuning.held_out.values())
    # The base model, each arm with its routing, the last text for all but the first arm loaded again.
    plans, controls = len(experiment.plans), len(experiment.controls)
    passes = 1 + 1.2 * (plans + controls) + (plans - 1) / 3
    measuring = passes * held_out / batch.numel() * step / 3  # a forward pass is a third of a step
    arms = 0.0
    for plan in experiment.plans:
        trial = copy.deepcopy(model)
        plan.apply(trial, experiment.fine_tuning.steps, seed)
        arms += OPTIMIZER_SHARE * seconds_per_step(trial, batch[: texts.tuning.rows])
    return Costs(step, arms * (1 + controls / plans), measuring)


def plan_pretraining(
    costs: Costs, experiment: Experiment, settings: DemoSettings, deadline: float, console: Console
) -> Recipe:
    """The pretraining that fits the time; says what is to be expected of the whole run."""
    wanted = experiment.pretraining.steps, experiment.fine_tuning.steps
    steps = costs.fit(*wanted, deadline - time.perf_counter())
    console.print(
        f"  predicted: {costs.total(*steps):.0f} s for {steps[0]} steps of pretraining, "
        f"{len(experiment.plans) + len(experiment.controls)} x {steps[1]} of fine-tuning, and measuring"
    )
    return cut("pretraining", experiment.pretraining, steps[0], settings, console)


def plan_fine_tuning(
    costs: Costs, experiment: Experiment, settings: DemoSettings, deadline: float, console: Console
) -> Recipe:
    """Each arm's fine-tuning, with what time is left after the pretraining."""
    _, steps = costs.fit(0, experiment.fine_tuning.steps, deadline - time.perf_counter())
    return cut("each fine-tuning", experiment.fine_tuning, steps, settings, console)


def cut(phase: str, recipe: Recipe, steps: int, settings: DemoSettings, console: Console) -> Recipe:
    """The recipe with so many steps; says if they are fewer: it is another experiment than the documentation's then."""
    if steps < recipe.steps:
        console.print(
            f"  slow machine: {phase} is cut from {recipe.steps} to {steps} steps to end within "
            f"{settings.minutes:g} minutes (--minutes gives it more)",
            style="yellow",
        )
    return replace(recipe, steps=steps)


def pretrain(model: nn.Module, texts: DemoTexts, recipe: Recipe, pace: Pace, seed: int, console: Console) -> None:
    """Train the whole model on library source, for fewer steps if they take longer than predicted."""
    seq_len = texts.tuning.seq_len
    stream = pace.while_it_fits(batches([(texts.source, PRETRAINING_ROWS)], seq_len, recipe.steps, seed))
    with training_progress(console, "pretraining", recipe.steps, PRETRAINING_ROWS * seq_len) as on_step:
        train(model, stream, recipe, on_step)
    if pace.steps < recipe.steps:
        console.print(
            f"  a step took {pace.slowness:.1f} times what was predicted: pretraining ended after {pace.steps} of "
            f"{recipe.steps} steps, to leave time for the fine-tuning",
            style="yellow",
        )


def fine_tune(
    base: Path,
    texts: Texts,
    experiment: Experiment,
    recipe: Recipe,
    settings: DemoSettings,
    console: Console,
    before: Mapping[str, float],
) -> list[Arm]:
    """Each arm from the same weights, whose held-out bits per byte were ``before``, on the same batches."""
    arms: list[Arm] = []
    plans: list[ArmPlan | ControlPlan] = [*experiment.plans, *experiment.controls]
    for planned in plans:
        plan = planned if isinstance(planned, ArmPlan) else planned(arms)
        model, _ = load_pretrained(base, pick_device(settings.device))
        arm = Arm.prepare(plan, recipe, model, settings.seed)
        arm.train(texts, settings.seed, console, arm_directory(settings.output, plan), before)
        arms.append(arm)
    return arms


def arm_directory(output: Path, plan: ArmPlan) -> Path:
    """For the history of an arm, and its adapters."""
    return output / "adapters" / plan.name


def check(arms: Sequence[Arm], base: Path, texts: Texts, settings: DemoSettings) -> dict[str, bool]:
    """Whether budgets are equal, growth leaves the output alone, and the adapters come back as they were saved."""
    checks = same_budget(arms)
    for arm in arms[1:]:
        if isinstance(arm.plan.method(arm.recipe.steps), DynamicRank):
            model, _ = load_pretrained(base, arm.model.device)
            checks |= growth_keeps_output(arm.plan, arm.recipe, model, texts, settings.seed)
        checks |= save_and_reload(arm, base, texts, settings.output)
    return checks


def save_and_reload(arm: Arm, base: Path, texts: Texts, output: Path) -> dict[str, bool]:
    """Save the arm's adapters, and check them on a fresh copy of the base model by the last held-out text."""
    directory = arm_directory(output, arm.plan)
    arm.adapters.save(directory)
    model, _ = load_pretrained(base, arm.model.device)
    last = dict([list(texts.held_out.items())[-1]])
    return comes_back(directory, arm.plan, arm.recipe.steps, model, replace(texts, held_out=last), arm.bits)
