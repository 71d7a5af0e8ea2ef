"""What fine-tuning came to, printed and drawn: bits per byte, ranks, parameters, time, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lrlora_ops.finetune.arm import Arm
from lrlora_ops.finetune.progress import spread
from lrlora_ops.report import heatmap, rank_table


def print_results(console: Console, before: dict[str, float], arms: Sequence[Arm]) -> None:
    """Bits per byte before and after each method, and what each took."""
    table = Table(title="Held-out bits per byte (less is better)", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("before", *(arm.plan.name for arm in arms)):
        table.add_column(name, justify="right")
    for text, bits in before.items():
        table.add_row(text, f"{bits:.3f}", *(f"{arm.bits[text]:.3f}" for arm in arms))
    table.add_section()
    rows = {
        "adapter parameters": [f"{arm.parameters:,}" for arm in arms],
        "sum of ranks": [f"{sum(arm.ranks):,}" for arm in arms],
        "rank min/avg/max": [spread(arm.ranks) for arm in arms],
        "training seconds": [f"{arm.seconds:.1f}" for arm in arms],
        "adapters, gradients, Adam: MB": [f"{arm.held[0] / 1e6:.2f}" for arm in arms],
        "the same at the end": [f"{arm.held[1] / 1e6:.2f}" for arm in arms],
    }
    if any(arm.gpu_bytes is not None for arm in arms):
        rows["GPU peak, MB"] = [f"{(arm.gpu_bytes or 0) / 1e6:,.0f}" for arm in arms]
    for name, cells in rows.items():
        table.add_row(name, "", *cells)
    console.print(table)


def print_comparison(console: Console, baseline: Arm, others: Sequence[Arm]) -> None:
    """How far the others ended below the baseline, or above."""
    for arm in others:
        gains = {text: bits - arm.bits[text] for text, bits in baseline.bits.items()}
        parts = [f"{text} {abs(gain):.3f} {'better' if gain > 0 else 'worse'}" for text, gain in gains.items()]
        line = f"{arm.plan.name} against {baseline.plan.name}, in bits per byte: {'; '.join(parts)}"
        console.print(line, highlight=False)


def show_ranks(console: Console, arm: Arm, picture: Path) -> None:
    """The ranks of every layer and module, as a table and as a picture."""
    console.print(rank_table(arm.rank_by_layer, f"Ranks of {arm.plan.name}"))
    heatmap(arm.rank_by_layer, picture, f"{arm.plan.name}: rank by layer and module")
