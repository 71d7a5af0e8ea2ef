"""Ranks by layer and expert beside what is routed there: as text for the terminal, as a heatmap for the eye."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from rich.text import Text
from torch import Tensor

from lrlora_ops.report import split_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

EXPERTS_PER_LINE = 16
CELL, CELL_WITH_NUMBER, SMALLEST_CELL, PANEL = 0.3, 0.2, 0.07, 6.0  # inches
COLOR_LOW, COLOR_HIGH = (38, 44, 88), (250, 226, 90)


@dataclass(frozen=True)
class ExpertMap:
    """Ranks of experts, and shares of the rows of texts that they get.

    Attributes:
        layers: Names of the layers, in the order of the model.
        ranks: Per layer, a rank for each expert.
        shares: By text, per layer, the share of the text's rows for each expert; a layer's sum is 1.
    """

    layers: list[str]
    ranks: list[list[int]]
    shares: dict[str, list[list[float]]]

    @classmethod
    def of(cls, ranks: Mapping[str, Tensor], routing: Mapping[str, Mapping[str, Tensor]]) -> ExpertMap:
        """Arrange ``Adapters.ranks()`` of experts, ``[E]`` each, and the shares ``[E]`` by text and adapter."""
        layers = [layer or ".".join((*stack.split("."), module)) for stack, layer, _, module in map(split_name, ranks)]
        if len(set(layers)) < len(layers):  # an encoder's and a decoder's layers, or two experts modules in one layer
            layers = list(ranks)
        shares = {text: [of_text[name].tolist() for name in ranks] for text, of_text in routing.items()}
        return cls(layers, [own.tolist() for own in ranks.values()], shares)

    @property
    def num_experts(self) -> int:
        """Of the layer that has most."""
        return max(map(len, self.ranks))

    def weighted_rank(self, text: str) -> float:
        """The rank that a row of the text meets in the mean: sum over experts of share * rank, mean over the layers."""
        cells = [zip(*layer, strict=True) for layer in zip(self.ranks, self.shares[text], strict=True)]
        return sum(rank * share for layer in cells for rank, share in layer) / len(self.ranks)

    def panels(self) -> dict[str, list[list[float]]]:
        """Titles and numbers: ranks, then percent of the rows of each text."""
        percent = {
            f"% of rows, {text}, token-weighted rank {self.weighted_rank(text):.1f}": [
                [100 * share for share in layer] for layer in shares
            ]
            for text, shares in self.shares.items()
        }
        mean = sum(map(sum, self.ranks)) / sum(map(len, self.ranks))
        return {f"rank, mean {mean:.1f}": [list(map(float, layer)) for layer in self.ranks], **percent}


def expert_panels(experts: ExpertMap) -> list[Text]:
    """A block of text for ranks and for each text's rows: layers down, experts across, numbers on colours."""
    return [_block(title, experts.layers, values) for title, values in experts.panels().items()]


def _block(title: str, layers: Sequence[str], values: Sequence[Sequence[float]]) -> Text:
    largest = max(max(map(max, values)), 1e-9)
    label = max(len("layer"), *map(len, layers))
    block = Text(f"{title}\n", no_wrap=True)
    for first in range(0, max(map(len, values)), EXPERTS_PER_LINE):
        experts = range(first, min(first + EXPERTS_PER_LINE, max(map(len, values))))
        block.append(f"{'layer':>{label}} " + "".join(f"{expert:4}" for expert in experts) + "\n", "dim")
        for layer, row in zip(layers, values, strict=True):
            block.append(f"{layer:>{label}} ")
            for value in row[experts.start : experts.stop]:
                block.append(f"{value:4.0f}", _style(value / largest))
            block.append("\n")
    return block


def _style(level: float) -> str:
    color = ",".join(str(round(low + level * (high - low))) for low, high in zip(COLOR_LOW, COLOR_HIGH, strict=True))
    return f"{'black' if level > 0.5 else 'white'} on rgb({color})"


def expert_heatmap(maps: Mapping[str, ExpertMap], path: str | PathLike[str]) -> None:
    """Draw a PNG: a row of panels for each map, its ranks and beside them the share of each text's rows.

    Numbers stand in the cells if there is room for them, else there are colour bars.

    Args:
        maps: By title, of the same model and texts.
        path: The file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [list(experts.panels().items()) for experts in maps.values()]
    num_experts = max(experts.num_experts for experts in maps.values())
    num_layers = max(len(experts.layers) for experts in maps.values())
    cell = min(CELL, max(SMALLEST_CELL, PANEL / num_experts))
    numbers = cell >= CELL_WITH_NUMBER
    width = len(panels[0]) * (cell * num_experts + (0.2 if numbers else 0.9)) + 0.5
    figure = Figure(
        figsize=(width, len(maps) * (max(cell, 0.16) * num_layers + 0.8) + 0.2), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    largest = [max(max(map(max, values)) for _, values in column) or 1.0 for column in zip(*panels, strict=True)]
    ceilings = [largest[0], *[max(largest[1:], default=1.0)] * (len(largest) - 1)]  # all shares on one scale
    grid = figure.subplots(len(maps), len(panels[0]), squeeze=False)
    for axes_row, (title, experts), own in zip(grid, maps.items(), panels, strict=True):
        for axes, (name, values), ceiling in zip(axes_row, own, ceilings, strict=True):
            is_rank = axes is axes_row[0]
            image = _draw(axes, values, ceiling, is_rank, numbers)
            axes.set_title(f"{title}: {name}" if is_rank else name, fontsize=11)
            axes.set_yticks([])
            if is_rank:
                _name_layers(axes, experts.layers)
            if not numbers:
                figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
    figure.savefig(path)


def _draw(axes: Axes, values: list[list[float]], largest: float, is_rank: bool, numbers: bool) -> AxesImage:
    from matplotlib.colors import PowerNorm

    width = max(map(len, values))
    padded = [row + [math.nan] * (width - len(row)) for row in values]
    # Shares are mostly small: their square root tells them apart.
    norm = PowerNorm(1.0 if is_rank else 0.5, 0, largest)
    image = axes.imshow(padded, cmap="viridis" if is_rank else "Blues", aspect="auto", norm=norm)
    for y, row in enumerate(values if numbers else []):
        for x, value in enumerate(row):
            dark = (norm(value) < 0.6) == is_rank
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    if numbers:  # white lines between the cells
        axes.set_xticks([x - 0.5 for x in range(1, width)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(values))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
    axes.set_xticks(range(0, width, -(-width // 16)))
    axes.set_xlabel("expert", fontsize=9)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_ylabel("layer", fontsize=9)
