"""Ranks by layer and module: a table for the terminal, a heatmap for the eye. Stable ranks have a decimal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class RankMatrix:
    """Ranks arranged by layer and by module within a layer.

    ``model.layers.3.self_attn.q_proj`` is layer ``3``, group ``self_attn``, module ``q_proj``; the first number in a
    name is the layer. Names with different words before the number (an encoder's and a decoder's layers) keep these
    words; a name without a number has a row for what holds the module.

    Attributes:
        rows: Names of the layers, in the order of the model.
        columns: ``(group, module)`` each, modules of one group next to each other.
        ranks: Rank by ``(row, column)``, where the layer has such a module; a float for a stable rank.
    """

    rows: list[str]
    columns: list[tuple[str, str]]
    ranks: dict[tuple[str, tuple[str, str]], int | float]

    @classmethod
    def of(cls, ranks: Mapping[str, int | float | Tensor]) -> RankMatrix:
        split = {name: split_name(name) for name in ranks}
        stacks = {stack for stack, layer, *_ in split.values() if layer}
        cells = {}
        for name, rank in ranks.items():
            stack, layer, group, module = split[name]
            row = layer if len(stacks) == 1 and layer else f"{stack} {layer}".strip()
            cells[row, (group, module)] = rank.item() if isinstance(rank, Tensor) else rank
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        groups = list(dict.fromkeys(group for group, _ in columns))
        return cls(rows, sorted(columns, key=lambda column: groups.index(column[0])), cells)

    @property
    def groups(self) -> dict[str, list[tuple[str, str]]]:
        """Columns by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for column in self.columns:
            groups.setdefault(column[0], []).append(column)
        return groups

    @property
    def what(self) -> str:
        """What the numbers are."""
        stable = {isinstance(rank, float) for rank in self.ranks.values()}
        return {False: "rank", True: "stable rank"}[stable.pop()] if len(stable) == 1 else "rank, or stable rank x.x"

    def mean(self, row: str | None = None, group: str | None = None) -> float | None:
        """Mean rank of a row, a group, both, or everything; None if there is no such cell."""
        chosen = [rank for (r, column), rank in self.ranks.items() if row in (None, r) and group in (None, column[0])]
        return sum(chosen) / len(chosen) if chosen else None


def split_name(name: str) -> tuple[str, str, str, str]:
    """``(stack, layer, group, module)`` of a module's dotted name; parts that it does not have are empty."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return ".".join(parts[:-1]) or "model", "", "", parts[-1]
    inner = parts[at + 1 :] or [""]
    group = ".".join(inner[:-1])
    return ".".join(parts[:at]), parts[at], group, inner[-1]


def shown(rank: int | float) -> str:
    """A rank as it is, a stable rank with one decimal."""
    return f"{rank:.1f}" if isinstance(rank, float) else str(rank)


def rank_table(ranks: Mapping[str, int | float | Tensor], title: str = "") -> Table:
    """Layers down, modules across, and the mean of each group: attention against MLP.

    Args:
        ranks: Rank by module name, as ``Adapters.ranks()`` has it.
        title: Above the table.
    """
    matrix = RankMatrix.of(ranks)
    table = Table(title=title or None, title_justify="left", show_footer=True, box=box.SIMPLE)
    table.add_column("layer", footer="mean")
    for column in matrix.columns:
        values = [matrix.ranks[row, column] for row in matrix.rows if (row, column) in matrix.ranks]
        header = column[1].removesuffix("_proj")
        table.add_column(header, footer=f"{sum(values) / len(values):.1f}", justify="right")
    for group in matrix.groups:
        table.add_column(f"mean\n{group or 'others'}", footer=_mean(matrix.mean(group=group)), justify="right")
    for row in matrix.rows:
        known = [matrix.ranks.get((row, column)) for column in matrix.columns]
        cells = ["" if rank is None else shown(rank) for rank in known]
        table.add_row(row, *cells, *(_mean(matrix.mean(row, group)) for group in matrix.groups))
    return table


def _mean(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def heatmap(ranks: Mapping[str, int | float | Tensor], path: str | PathLike[str], title: str | None = None) -> None:
    """Draw the ranks as a PNG: layers down, modules across by group, a number in each cell.

    Args:
        ranks: Rank by module name, as ``Adapters.ranks()`` has it.
        path: The file to write.
        title: The mean rank is added to it. Default: "Rank by layer and module", or "Stable rank ...".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matrix = RankMatrix.of(ranks)
    groups, size = matrix.groups, (2.2 + 0.75 * len(matrix.columns), 1.9 + 0.42 * len(matrix.rows))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    title = f"{matrix.what.capitalize()} by layer and module" if title is None else title
    figure.suptitle(f"{title} (mean {_mean(matrix.mean())})")
    widths = [len(columns) for columns in groups.values()]
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=widths)[0]
    for axes, (group, columns) in zip(panels, groups.items(), strict=True):
        image = _draw_group(axes, matrix, columns, max(1, *matrix.ranks.values()))
        axes.set_title(f"{group or 'others'}: mean {_mean(matrix.mean(group=group))}", fontsize=10)
        axes.set_yticks(range(len(matrix.rows)), matrix.rows if axes is panels[0] else [])
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label=matrix.what, fraction=0.05, pad=0.02, ticks=MaxNLocator(integer=True))
    figure.savefig(path)


def _draw_group(axes: Axes, matrix: RankMatrix, columns: list[tuple[str, str]], largest: float) -> AxesImage:
    values = [[matrix.ranks.get((row, column), math.nan) for column in columns] for row in matrix.rows]
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0, vmax=largest)
    for y, row in enumerate(values):
        for x, rank in enumerate(row):
            if not math.isnan(rank):
                color = "white" if rank < 0.6 * largest else "black"
                axes.text(x, y, shown(rank), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(columns)), [module for _, module in columns], rotation=35, ha="right")
    # White lines between the cells.
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(matrix.rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image
