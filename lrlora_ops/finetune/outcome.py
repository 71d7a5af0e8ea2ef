"""What fine-tuning came to, printed: bits per byte, ranks, parameters, time, memory."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lrlora_ops.finetune.arm import Arm
from lrlora_ops.report import rank_table


def print_results(console: Console, before: dict[str, float], arms: Sequence[Arm]) -> None:
    """Bits per byte before and after each method, and what each took."""
    table = Table(title="Held-out bits per byte (less is better)", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("before", *(type(arm.method).__name__ for arm in arms)):
        table.add_column(name, justify="right")
    for text, bits in before.items():
        table.add_row(text, f"{bits:.3f}", *(f"{arm.bits[text]:.3f}" for arm in arms))
    table.add_section()
    rows = {
        "adapter parameters": [f"{arm.parameters:,}" for arm in arms],
        "sum of ranks": [f"{sum(arm.ranks.values()):,}" for arm in arms],
        "rank min/avg/max": [_spread(arm) for arm in arms],
        "training seconds": [f"{arm.seconds:.1f}" for arm in arms],
        "adapters, gradients, Adam: MB": [f"{arm.held[0] / 1e6:.2f}" for arm in arms],
        "the same at the end": [f"{arm.held[1] / 1e6:.2f}" for arm in arms],
    }
    if any(arm.gpu_bytes is not None for arm in arms):
        rows["GPU peak, MB"] = [f"{(arm.gpu_bytes or 0) / 1e6:,.0f}" for arm in arms]
    for name, cells in rows.items():
        table.add_row(name, "", *cells)
    console.print(table)


def _spread(arm: Arm) -> str:
    ranks = list(arm.ranks.values())
    return f"{min(ranks)}/{sum(ranks) / len(ranks):.1f}/{max(ranks)}"


def print_comparison(console: Console, fixed: Arm, learned: Arm) -> None:
    """How far LearnedRank ended below FixedRank, or above."""
    parts = []
    for text, bits in fixed.bits.items():
        gain = bits - learned.bits[text]
        parts.append(f"{text} {abs(gain):.3f} {'better' if gain > 0 else 'worse'}")
    console.print(f"LearnedRank against FixedRank, in bits per byte: {'; '.join(parts)}", highlight=False)


def print_ranks(console: Console, arm: Arm) -> None:
    """The ranks of every layer and module."""
    console.print(rank_table(arm.ranks, f"Ranks of {type(arm.method).__name__}"))
