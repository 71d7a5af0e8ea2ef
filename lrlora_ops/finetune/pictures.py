"""The pictures of ``lrlora report``: heatmaps of each run, and how loss and ranks went in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lrlora_ops.expert_map import ExpertMap, expert_heatmap
from lrlora_ops.finetune.runs import Run
from lrlora_ops.report import heatmap

# Okabe and Ito's colours, which most eyes tell apart; from the second round on lines are dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_run(run: Run, directory: Path, name: str) -> list[Path]:
    """``ranks-NAME.png``, linear layers, and ``experts-NAME.png``, experts beside what is routed to them."""
    by_adapter, drawn = run.by_adapter(run.ranks), []
    linear = {adapter: own[0] for adapter, own in by_adapter.items() if run.num_experts[adapter] == 1}
    experts = {adapter: torch.tensor(own) for adapter, own in by_adapter.items() if run.num_experts[adapter] > 1}
    if linear:
        drawn.append(directory / f"ranks-{name}.png")
        heatmap(linear, drawn[-1], f"{run.label}: rank by layer and module")
    if experts:
        drawn.append(directory / f"experts-{name}.png")
        routing = (run.end or {}).get("routing", {})
        shares = {text: {adapter: torch.tensor(of[adapter]) for adapter in experts} for text, of in routing.items()}
        expert_heatmap({run.label: ExpertMap.of(experts, shares)}, drawn[-1])
    return drawn


def draw_runs(runs: Sequence[Run], directory: Path) -> list[Path]:
    """``growth.png``: loss and ranks of all runs by step, the band from the lowest rank to the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    loss, rank = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": "--" if index >= len(COLORS) else "-"}
        known = [(step["step"], step["loss"]) for step in run.steps if step["loss"] is not None]
        loss.plot(*zip(*known, strict=True) if known else ([], []), label=run.label, linewidth=1.2, **style)
        steps = [line["step"] for line in run.snapshots]
        own = [line["ranks"] for line in run.snapshots]
        rank.plot(steps, [sum(ranks) / len(ranks) for ranks in own], label=run.label, linewidth=1.8, **style)
        rank.fill_between(steps, list(map(min, own)), list(map(max, own)), color=style["color"], alpha=0.12)
    for axes, title, unit in (
        (loss, "Training loss", "nats per token"),
        (rank, "Rank: mean, lowest to highest", "rank"),
    ):
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rank.set_ylim(bottom=0)
    figure.legend(*rank.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(directory / "growth.png")
    return [directory / "growth.png"]
