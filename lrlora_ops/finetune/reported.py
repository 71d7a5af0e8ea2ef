"""``lrlora report``: runs as a page and as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.gpus import GPUS
from lrlora_ops.finetune.page import render
from lrlora_ops.finetune.pictures import draw_run, draw_runs
from lrlora_ops.finetune.runs import read_runs


def write_report(directories: Sequence[Path], output: Path, gpu: str, console: Console) -> None:
    """Write ``report.html`` and the pictures; what an earlier report left there is replaced.

    Args:
        directories: Of runs, or above them.
        output: A directory; made if need be.
        gpu: A key of ``GPUS``, whose rates floors of time are computed with.
        console: To print on.

    Raises:
        CommandError: The input cannot be used, or the output cannot be written.
    """
    if gpu not in GPUS:
        raise CommandError(f"--gpu is {gpu}; it must be one of {', '.join(GPUS)}")
    runs = read_runs(directories)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").write_text(render(runs, gpu), encoding="utf-8")
        pictures = draw_runs(runs, output)
        for number, run in enumerate(runs, 1):
            pictures += draw_run(run, output, f"{number}-" + re.sub(r"\W+", "-", run.label).strip("-"))
    except OSError as error:
        raise CommandError(f"{output} cannot be written ({error.strerror}): choose another --output") from None
    names = ", ".join(picture.name for picture in pictures)
    console.print(f"{output / 'report.html'}: {', '.join(run.label for run in runs)}", highlight=False, soft_wrap=True)
    console.print(f"  pictures: {names}", highlight=False, soft_wrap=True)
