"""A progress bar that shows what training is about: loss, speed, ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrlora_ops import Adapters


@contextmanager
def training_progress(
    console: Console,
    title: str,
    steps: int,
    tokens_per_step: float,
    adapters: Adapters | None = None,
    done: int = 0,
) -> Iterator[Callable[[float], None]]:
    """Show a bar, with the lowest, mean and highest rank; call what it yields with the loss after every step.

    Of the steps, ``done`` were made before, in the run that this one resumes.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, completed=done, status="")
        start, made, smooth = time.perf_counter(), 0, 0.0

        def on_step(loss: float) -> None:
            nonlocal made, smooth
            made += 1
            smooth = loss if made == 1 else 0.95 * smooth + 0.05 * loss
            speed = made * tokens_per_step / (time.perf_counter() - start)
            status = f"loss {smooth:.3f} · {speed:,.0f} tokens/s"
            if adapters is not None:
                status += f" · ranks {spread(rank_list(adapters))}"
            progress.update(task, completed=done + made, status=status)

        yield on_step


def rank_list(adapters: Adapters) -> list[int]:
    """The rank of every layer, or of every expert in it."""
    return torch.cat([ranks.flatten() for ranks in adapters.ranks().values()]).tolist()


def spread(ranks: list[int]) -> str:
    """Lowest, mean and highest."""
    return f"{min(ranks)}/{sum(ranks) / len(ranks):.1f}/{max(ranks)}"
