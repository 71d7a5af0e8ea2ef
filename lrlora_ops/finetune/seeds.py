"""The demo for several seeds: each of them, and their means."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from lrlora_ops.finetune.demo import DemoSettings, Results, run_demo
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.experiments import Experiment


def run_seeds(
    experiment: Callable[[int], Experiment], seeds: Sequence[int], settings: DemoSettings, console: Console
) -> None:
    """Run the demo once per seed, each with a base model of its own, in a directory of its own if there are several.

    Args:
        experiment: By seed.
        seeds: At least one; no two are equal.
        settings: Of each run, but for the seed.
        console: Printed to.

    Raises:
        CommandError, CheckFailed: As ``run_demo`` does.
    """
    if len(set(seeds)) < len(seeds):
        raise CommandError(f"--seeds has {', '.join(map(str, seeds))}; leave out what is there twice")
    results = {}
    for seed in seeds:
        output = settings.output / f"seed-{seed}" if len(seeds) > 1 else settings.output
        if len(seeds) > 1:
            console.rule(f"seed {seed}")
        results[seed] = run_demo(experiment(seed), replace(settings, seed=seed, output=output), console)
    if len(seeds) > 1:
        print_means(console, results)


def print_means(console: Console, results: Mapping[int, Results]) -> None:
    """For each held-out text a table: arms down, the mean and every seed across."""
    first = next(iter(results.values()))
    for text in first["before"]:
        table = Table(title=f"Held-out bits per byte, {text}", title_justify="left", box=box.SIMPLE)
        table.add_column("")
        for heading in ("mean", *(f"seed {seed}" for seed in results)):
            table.add_column(heading, justify="right")
        for arm in first:
            bits = [of_seed[arm][text] for of_seed in results.values()]
            table.add_row(arm, *(f"{value:.3f}" for value in (statistics.fmean(bits), *bits)))
        console.print(table)
