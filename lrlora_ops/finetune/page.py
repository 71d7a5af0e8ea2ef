"""What the page of ``lrlora report`` shows, as numbers; lrlora_ops/finetune/templates draws them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex

import lrlora_ops
from lrlora_ops.expert_map import ExpertMap
from lrlora_ops.finetune.ranks import known
from lrlora_ops.finetune.run_costs import run_costs
from lrlora_ops.finetune.runs import Run
from lrlora_ops.report import RankMatrix

LOSSES, SNAPSHOTS, NUMBERS = 400, 100, 400_000  # at most, of a run: points of its curve, steps shown, ranks in all
RANKS = {"rank": "ranks", "stable rank": "stable_ranks"}  # by what a map shows: where a snapshot has it
# Sequential and of monotone lightness, so that they are read without hues; zero is near the colour of the page.
COLORS: dict[str, dict[str, Colormap]] = {
    "rank": {"light": colormaps["viridis"], "dark": colormaps["viridis"]},
    "share": {
        "light": colormaps["Blues"],
        "dark": LinearSegmentedColormap.from_list("share", ["#20252e", "#215a9c", "#6fb0e6", "#e8f3fd"]),
    },
    "sensitivity": {
        "light": colormaps["Oranges"],
        "dark": LinearSegmentedColormap.from_list("sensitivity", ["#20252e", "#8a3b0c", "#f39a4d", "#fff1e3"]),
    },
}


def render(runs: Sequence[Run], gpu: str) -> str:
    """The page, with everything that it needs in it."""
    loader = PackageLoader("lrlora_ops.finetune")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False}  # and the order of keys is that of the run
    page = templates.get_template("report.html")
    return page.render(data=page_data(runs, gpu), version=lrlora_ops.__version__)


def page_data(runs: Sequence[Run], gpu: str) -> dict[str, Any]:
    """All numbers of the page, as JSON has them."""
    shades = {
        what: {theme: [to_hex(colors(i / 63)) for i in range(64)] for theme, colors in themes.items()}
        for what, themes in COLORS.items()
    }
    return {"colors": shades, "runs": [run_data(run, gpu) for run in runs]}


def run_data(run: Run, gpu: str) -> dict[str, Any]:
    """One run."""
    snapshots = thinned(smoothed(run.snapshots), max(2, min(SNAPSHOTS, NUMBERS // len(run.ranks))))
    maps = heatmaps(run)
    return {
        "label": run.label,
        "summary": summary(run),
        "loss": losses(run),
        "maxRank": run.max_rank,
        "snapshots": snapshots,
        "maps": maps,
        "parts": parts(maps, snapshots),
        "costs": run_costs(run, gpu),
    }


def smoothed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Snapshots whose sensitivities are means over the last five, for one batch's are noisy; None before the first."""
    kept = []
    for index, line in enumerate(lines):
        recent = [own["sensitivity"] for own in lines[max(0, index - 4) : index + 1] if own.get("sensitivity")]
        mean = [_mean_of_known(values) for values in zip(*recent, strict=True)] or None
        kept.append({key: line.get(key) for key in ("step", "ranks", "stable_ranks")} | {"sensitivity": mean})
    return kept


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{statistics.fmean(known):.4g}") if known else None


def summary(run: Run) -> dict[str, Any]:
    """Of the table of runs: what was set, what came of it, None for what a run that has not ended does not know."""
    end, stable = run.end or {}, known(run.stable_ranks)
    return {
        "method": run.method,
        "machine": run.start["machine"],
        "started": run.start["started"],
        "directory": str(run.directory),
        "steps": run.start["steps"],
        "done": run.steps[-1]["step"] if run.steps else 0,
        "ended": run.end is not None,
        "rank": [min(run.ranks), statistics.fmean(run.ranks), max(run.ranks)],
        "sum": sum(run.ranks),
        "stable": _spread(stable) if stable else None,
        "parameters": end.get("parameters"),
        "before": run.start["before"],
        "bits": end.get("bits", {}),
        "heldOut": held_out(run),
        "seconds": run.seconds,
        "speed": run.tokens_per_second,
        "held": end.get("held"),
        "gpu": end.get("gpu_bytes"),
    }


def held_out(run: Run) -> dict[str, list[float]]:
    """Of each set that a trainer has evaluated, the first and the last loss that are finite."""
    found: dict[str, list[float]] = {}
    for line in run.held_out:
        for name, loss in line["held_out"].items():
            if loss is not None:
                found[name] = [*found.get(name, [])[:1], loss]
    return found


def losses(run: Run) -> list[list[float]]:
    """``[step, loss]``: means of equal stretches where there are more steps than points."""
    known = [(step["step"], step["loss"]) for step in run.steps if step["loss"] is not None]
    stretch = -(-len(known) // LOSSES) or 1
    stretches = [known[first : first + stretch] for first in range(0, len(known), stretch)]
    return [[own[-1][0], statistics.fmean(loss for _, loss in own)] for own in stretches]


def thinned(lines: Sequence[Any], most: int) -> list[Any]:
    """So many of them at most, evenly, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (most - 1))] for index in range(most)]


def heatmaps(run: Run) -> list[dict[str, Any]]:
    """Linear layers by layer and module, experts by layer and expert: where in the flat ranks each cell's is.

    Layers that have stable ranks have maps of their own. Cells are None where a layer has no such module. Experts have
    the share of each text's rows beside them.
    """
    places, found = run.by_adapter(range(len(run.ranks))), []
    for what, names in run.adapters.items():
        shown = {name: places[name] for name in names}
        linear = {name: own[0] for name, own in shown.items() if run.num_experts[name] == 1}
        experts = {name: torch.tensor(own) for name, own in shown.items() if run.num_experts[name] > 1}
        found += [_module_map(what, linear)] if linear else []
        found += [_expert_map(what, experts, run)] if experts else []
    return found


def _module_map(what: str, linear: dict[str, int]) -> dict[str, Any]:
    matrix = RankMatrix.of(linear)
    columns = [{"part": group or "others", "name": module} for group, module in matrix.columns]
    cells = [[matrix.ranks.get((row, column)) for column in matrix.columns] for row in matrix.rows]
    return {"kind": "module", "what": what, "rows": matrix.rows, "columns": columns, "cells": cells, "shares": {}}


def _expert_map(what: str, experts: dict[str, torch.Tensor], run: Run) -> dict[str, Any]:
    routing = (run.end or {}).get("routing", {})
    arranged = ExpertMap.of(
        experts, {text: {name: torch.tensor(of[name]).double() for name in experts} for text, of in routing.items()}
    )
    width = arranged.num_experts
    return {
        "kind": "expert",
        "what": what,
        "rows": arranged.layers,
        "columns": [{"part": "experts", "name": str(index)} for index in range(width)],
        "cells": [row + [None] * (width - len(row)) for row in arranged.ranks],
        "shares": arranged.shares,
    }


def parts(maps: Sequence[dict[str, Any]], history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Attention, MLP, experts: of each part of the layers, ``[lowest, mean, highest]`` rank in each snapshot."""
    members: dict[tuple[str, str], list[int]] = {}
    for cells in maps:
        for row in cells["cells"]:
            for column, place in zip(cells["columns"], row, strict=True):
                if place is not None:
                    members.setdefault((cells["what"], column["part"]), []).append(place)
    return [
        {
            "name": name,
            "what": what,
            "count": len(places),
            "ranks": [_spread([line[RANKS[what]][place] for place in places]) for line in history],
        }
        for (what, name), places in members.items()
    ]


def _spread(ranks: Sequence[float | None]) -> list[float | None]:
    own = known(ranks)
    return [min(own), statistics.fmean(own), max(own)] if own else [None] * 3
