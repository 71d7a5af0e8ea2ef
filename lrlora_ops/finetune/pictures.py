"""The pictures of ``lrlora report``: heatmaps of each run, and how loss and ranks went in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lrlora_ops.expert_map import ExpertMap, expert_heatmap
from lrlora_ops.finetune.ranks import known
from lrlora_ops.finetune.runs import Run
from lrlora_ops.report import heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which most eyes tell apart; from the second round on lines are dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_run(run: Run, directory: Path, name: str) -> list[Path]:
    """``ranks-NAME.png`` and ``stable-ranks-NAME.png``, linear layers, and ``experts-NAME.png``, experts beside what is
    routed to them."""
    drawn, values = [], {"rank": run.by_adapter(run.ranks), "stable rank": run.by_adapter(run.stable_ranks)}
    for what, names in run.adapters.items():
        ranks = {adapter: values[what][adapter][0] for adapter in names if run.num_experts[adapter] == 1}
        if ranks:
            drawn.append(directory / f"{what.replace(' ', '-')}s-{name}.png")
            heatmap(ranks, drawn[-1], f"{run.label}: {what} by layer and module")
    experts = {adapter: torch.tensor(own) for adapter, own in values["rank"].items() if run.num_experts[adapter] > 1}
    if experts:
        drawn.append(directory / f"experts-{name}.png")
        routing = (run.end or {}).get("routing", {})
        shares = {text: {adapter: torch.tensor(of[adapter]) for adapter in experts} for text, of in routing.items()}
        expert_heatmap({run.label: ExpertMap.of(experts, shares)}, drawn[-1])
    return drawn


def draw_runs(runs: Sequence[Run], directory: Path) -> list[Path]:
    """``growth.png``: loss and ranks of all runs by step, the band from the lowest rank to the highest; stable ranks
    beside them if a run has such."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = {"ranks": "rank", "stable_ranks": "stable rank"}
    charts = {key: what for key, what in charts.items() if any(key in run.start for run in runs)}
    figure = Figure(figsize=(5 * (1 + len(charts)), 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    loss, *others = figure.subplots(1, 1 + len(charts))
    for index, run in enumerate(runs):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": "--" if index >= len(COLORS) else "-"}
        points = [(step["step"], step["loss"]) for step in run.steps if step["loss"] is not None]
        loss.plot(*zip(*points, strict=True) if points else ([], []), label=run.label, linewidth=1.2, **style)
        for axes, key in zip(others, charts, strict=True):
            _draw_spread(axes, run, key, style)
    _describe(loss, "Training loss", "nats per token")
    for axes, what in zip(others, charts.values(), strict=True):
        _describe(axes, f"{what.capitalize()}: mean, lowest to highest", what)
        axes.set_ylim(bottom=0)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(directory / "growth.png")
    return [directory / "growth.png"]


def _draw_spread(axes: Axes, run: Run, key: str, style: dict[str, Any]) -> None:
    """The ranks of a run by step: their mean, and a band from the lowest to the highest."""
    lines = [(line["step"], own) for line in run.snapshots if (own := known(line.get(key)))]
    if lines:
        steps, ranks = zip(*lines, strict=True)
        axes.plot(steps, [sum(own) / len(own) for own in ranks], linewidth=1.8, **style)
        axes.fill_between(steps, list(map(min, ranks)), list(map(max, ranks)), color=style["color"], alpha=0.12)


def _describe(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
