"""A progress bar that shows what training is about: loss, speed, and what else there is to say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def training_progress(
    console: Console, title: str, steps: int, tokens_per_step: float, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Show a bar; call what it yields with the loss after every step, and with a note to stand beside it.

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

        def on_step(loss: float, note: str = "") -> None:
            nonlocal made, smooth
            made += 1
            smooth = loss if made == 1 else 0.95 * smooth + 0.05 * loss
            speed = made * tokens_per_step / (time.perf_counter() - start)
            status = f"loss {smooth:.3f} · {speed:,.0f} tokens/s"
            progress.update(task, completed=done + made, status=f"{status} · {note}" if note else status)

        yield on_step
