"""What fine-tuning came to, printed and drawn: bits per byte, ranks, parameters, time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from lrlora_ops.expert_map import expert_heatmap, expert_panels
from lrlora_ops.finetune.arm import Arm
from lrlora_ops.finetune.ranks import spread
from lrlora_ops.report import heatmap, rank_table


def print_results(console: Console, before: dict[str, float], arms: Sequence[Arm]) -> None:
    """Bits per byte before and after each method, and what each took."""
    notes = ["MB held: adapters, their gradients and Adam's moments"]
    stable = [arm.stable_ranks for arm in arms]
    if any(stable):
        notes.append("stable rank: ||dW||_F^2 / ||dW||_2^2 of an update dW that SincUpdate learned")
    if any(arm.expert_map for arm in arms):
        notes.append("token-weighted rank: of the expert that a row of the texts trained on is sent to, in the mean")
    table = Table(
        title="Held-out bits per byte (less is better)",
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("", no_wrap=True)
    for name in ("before", *(arm.plan.name for arm in arms)):
        table.add_column(name, justify="right")
    for text, bits in before.items():
        table.add_row(text, f"{bits:.3f}", *(f"{arm.bits[text]:.3f}" for arm in arms))
    table.add_section()
    rows = {
        "adapter parameters": [f"{arm.parameters:,}" for arm in arms],
        "sum of ranks": [f"{sum(arm.ranks):,}" for arm in arms],
        "rank min/avg/max": [spread(arm.ranks) for arm in arms],
        "stable rank min/avg/max": [spread(own) if own else "" for own in stable] if any(stable) else [],
        "token-weighted rank": [f"{rank:.1f}" for arm in arms if (rank := token_weighted_rank(arm)) is not None],
        "training seconds": [f"{arm.seconds:.1f}" for arm in arms],
        "MB held at the start": [f"{arm.held[0] / 1e6:.2f}" for arm in arms],
        "MB held at the end": [f"{arm.held[1] / 1e6:.2f}" for arm in arms],
    }
    if any(arm.gpu_bytes is not None for arm in arms):
        rows["GPU peak, MB"] = [f"{(arm.gpu_bytes or 0) / 1e6:,.0f}" for arm in arms]
    for name, cells in rows.items():
        if cells:
            table.add_row(name, "", *cells)
    console.print(table)


def token_weighted_rank(arm: Arm) -> float | None:
    """The rank that a row of the texts that are trained on meets in the mean; None without adapted experts."""
    experts = arm.expert_map
    return statistics.fmean(map(experts.weighted_rank, experts.shares)) if experts else None


def print_comparison(console: Console, baseline: Arm, others: Sequence[Arm]) -> None:
    """How far the others ended below the baseline, or above."""
    for arm in others:
        parts = [f"{text} {compare(bits, arm.bits[text])}" for text, bits in baseline.bits.items()]
        line = f"{arm.plan.name} against {baseline.plan.name}, in bits per byte: {'; '.join(parts)}"
        console.print(line, highlight=False)


def compare(baseline: float, bits: float) -> str:
    """``0.012 better``, ``0.012 worse`` or ``equal``, as the printed digits have it."""
    gain = round(baseline, 3) - round(bits, 3)
    return f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'}" if abs(gain) > 5e-4 else "equal"


def print_ranks(console: Console, arm: Arm) -> None:
    """The ranks of every layer and module, and those of every expert beside what is routed to it."""
    for what, ranks in by_kind(arm).items():
        console.print(rank_table(ranks, f"{what.capitalize()}s of {arm.plan.name}"))
    if arm.expert_map:
        console.print(f"Experts of {arm.plan.name}", style="italic", highlight=False)
        console.print(Columns(expert_panels(arm.expert_map), padding=(0, 3)))


def by_kind(arm: Arm) -> dict[str, dict[str, int | float]]:
    """The ranks of layers, and the stable ranks of those that have such, by name; what there is of the two."""
    kinds: dict[str, dict[str, int | float]] = {}
    for name, rank in arm.rank_by_layer.items():
        kinds.setdefault("stable rank" if isinstance(rank, float) else "rank", {})[name] = rank
    return kinds


def draw_ranks(arms: Sequence[Arm], directory: Path) -> list[Path]:
    """The same as pictures: layers and modules of the last arm that has such ranks, and all arms' experts.

    Returns:
        What was written, as far as the arms have it: ``ranks.png``, ``stable-ranks.png``, ``experts.png``.
    """
    drawn = {}
    for arm in arms:
        for what, ranks in by_kind(arm).items():
            drawn[directory / f"{what.replace(' ', '-')}s.png"] = ranks, f"{arm.plan.name}: {what} by layer and module"
    for path, (ranks, title) in drawn.items():
        heatmap(ranks, path, title)
    if maps := {arm.plan.name: own for arm in arms if (own := arm.expert_map)}:
        expert_heatmap(maps, directory / "experts.png")
    return [*drawn, *([directory / "experts.png"] if maps else [])]
