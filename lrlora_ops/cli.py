"""The ``lrlora`` command: a demo on text that every machine has, and fine-tuning of a model of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

if missing := [name for name in ("typer", "rich", "matplotlib", "transformers", "tokenizers") if not find_spec(name)]:
    raise SystemExit(f"lrlora needs {', '.join(missing)}, not installed here: pip install 'lrlora_ops[cli]'")

import torch
import typer
from rich.console import Console

from lrlora_ops.finetune.errors import CommandError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Of the adapters, the batches and the sampled ranks.")]


class MethodName(str, Enum):
    learned = "learned"
    fixed = "fixed"


class DtypeName(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.callback()
def lrlora() -> None:
    """LoRA whose rank is not one number."""


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Steps are cut on a machine that would need longer.")] = 2.5,
    output: Annotated[Path, typer.Option(help="Directory for the model, the adapter and the heatmap.")] = Path(
        "lrlora-demo"
    ),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Pretrain a small language model on Python's library, then fine-tune it with fixed and with learned ranks."""
    with one_line_errors():
        from lrlora_ops.finetune.demo import DemoSettings, run_demo

        passed = run_demo(DemoSettings(output=output, minutes=minutes, seed=seed, device=device), Console())
    if not passed:
        raise typer.Exit(1)


@app.command()
def finetune(
    model: Annotated[Path, typer.Option(help="Hugging Face model directory; nothing is downloaded.")],
    train: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text files to train on.")],
    more: Annotated[list[Path] | None, typer.Argument(hidden=True, metavar="")] = None,
    method: Annotated[MethodName, typer.Option(help="How ranks are chosen.")] = MethodName.learned,
    rank: Annotated[float, typer.Option("--rank", "--mean-rank", help="Rank; the mean of all with learned.")] = 8.0,
    max_rank: Annotated[int | None, typer.Option(help="Highest learned rank. Default: four times the mean.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Layers, as names or globs. Default: all-linear.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 5e-4,
    eval_fraction: Annotated[float, typer.Option(help="Share of each file, its end, that is held out.")] = 0.1,
    output: Annotated[Path, typer.Option(help="New directory for the adapter.")] = Path("lrlora-adapter"),
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Of the model; auto is the checkpoint's own.")] = DtypeName.auto,
) -> None:
    """Fine-tune a causal language model on text files, and measure it on text that was held out."""
    with one_line_errors():
        from lrlora_ops.finetune.own_text import FineTuneSettings, run_fine_tuning

        settings = FineTuneSettings(
            model=model,
            files=(*train, *(more or [])),
            output=output,
            learned=method is MethodName.learned,
            rank=rank,
            max_rank=max_rank,
            targets=tuple(targets or ["all-linear"]),
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            lr=lr,
            eval_fraction=eval_fraction,
            seed=seed,
            device=device,
            dtype=dtype.value,
        )
        run_fine_tuning(settings, Console())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can put right becomes one line and exit code 2; a defect keeps its traceback."""
    try:
        yield
    except (CommandError, OSError) as error:
        _stop(str(error), 2)
    except torch.OutOfMemoryError:
        _stop("the GPU's memory is full: lower --batch-size or --seq-len, or add --dtype bfloat16", 2)
    except KeyboardInterrupt:
        _stop("stopped", 130)


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"lrlora: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def main() -> None:
    """Entry point of the ``lrlora`` command."""
    app()


if __name__ == "__main__":
    main()
