"""The ``lrlora`` command: a demo on text that every machine has, and fine-tuning of a model of one's own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

if missing := [
    name for name in ("typer", "rich", "matplotlib", "jinja2", "transformers", "tokenizers") if not find_spec(name)
]:
    print(f"lrlora needs {', '.join(missing)}, not installed here: pip install 'lrlora_ops[cli]'", file=sys.stderr)
    raise SystemExit(2)

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from lrlora_ops.finetune.errors import CheckFailed, CommandError

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer hold


class OneLineErrors(TyperGroup):
    """What the user can put right becomes one line and exit code 2; a defect keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run the command that the arguments name, and exit."""
        try:
            with self.make_context("lrlora", list(sys.argv[1:] if args is None else args)) as context:
                self.invoke(context)
        except typer.Exit as stop:
            sys.exit(stop.exit_code)
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "lrlora"
            exit_with(f"{error.format_message()} (see {command} --help)", 2)
        except (CommandError, OSError) as error:
            exit_with(str(error), 2)
        except CheckFailed as error:
            exit_with(str(error), 1)
        except torch.OutOfMemoryError:
            exit_with("the GPU's memory is full: lower --batch-size or --seq-len, or add --dtype bfloat16", 2)
        except KeyboardInterrupt:
            exit_with("stopped", 130)
        sys.exit()


def exit_with(message: str, code: int) -> NoReturn:
    """Say it in one line, and exit."""
    typer.echo(f"lrlora: {' '.join(message.split())}", err=True)
    sys.exit(code)


app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Of the adapters, the batches and the sampled ranks.")]


class MethodName(str, Enum):
    learned = "learned"
    fixed = "fixed"


class DoctorMethod(str, Enum):
    fixed = "fixed"
    learned = "learned"
    dynamic = "dynamic"


class DtypeName(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class FormatName(str, Enum):
    peft = "peft"
    vllm = "vllm"
    sglang = "sglang"
    merged = "merged"


@app.callback(invoke_without_command=True)
def lrlora(context: typer.Context) -> None:
    """LoRA whose rank is not one number."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    context: typer.Context,
    dense: Annotated[bool, typer.Option("--dense", help="A model without experts: fixed or learned ranks.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Uncut steps, control arms, and seeds 0, 1 and 2.")] = False,
    seeds: Annotated[
        list[int] | None, typer.Option(metavar="SEED...", help="Each a run of its own; default 0.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Steps are cut on a machine that would need longer; default 3.25 a seed.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for the model, the adapters and the heatmap.")] = Path(
        "lrlora-demo"
    ),
    device: Device = "auto",
) -> None:
    """Pretrain a small Mixture-of-Experts on Python's library, then fine-tune its experts: equal, growing, learned
    ranks."""
    from lrlora_ops.finetune import experiments
    from lrlora_ops.finetune.demo import DemoSettings
    from lrlora_ops.finetune.seeds import run_seeds

    minutes = minutes if minutes is not None else math.inf if full else DemoSettings.minutes
    chosen = [*(seeds or []), *further_seeds(context, seeds, more or [])] or ([0, 1, 2] if full else [0])
    experiment = experiments.dense if dense else partial(experiments.mixture_of_experts, controls=full)
    run_seeds(experiment, chosen, DemoSettings(output=output, minutes=minutes, device=device), Console())


def further_seeds(context: typer.Context, seeds: Sequence[int] | None, words: Sequence[str]) -> list[int]:
    """The seeds after the first one of ``--seeds 0 1 2``, which arrive as arguments."""
    if words and not seeds:
        context.fail(f"Got unexpected extra argument{'s' if len(words) > 1 else ''} ({' '.join(words)})")
    try:
        return [int(word) for word in words]
    except ValueError:
        context.fail(f"Invalid value for '--seeds': {' '.join(words)} are not all integers")


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


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="Hugging Face model directory that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Option(help="Directory that finetune or Adapters.save wrote, or a LoRA of PEFT.")],
    format: Annotated[
        FormatName, typer.Option(help="A LoRA for PEFT, vLLM or SGLang, or a whole model.")
    ] = FormatName.peft,
    output: Annotated[Path, typer.Option(help="New directory.")] = Path("lrlora-export"),
    dtype: Annotated[DtypeName, typer.Option(help="Of the model; auto is the checkpoint's own.")] = DtypeName.auto,
) -> None:
    """Write an adapter for other libraries, read it back and compare."""
    from lrlora_ops.finetune.exported import export_adapter

    export_adapter(model, adapter, output, format.value, dtype.value)


@app.command()
def doctor(
    directory: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A model, or adapters of --model.")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory that a RUN was trained on.")] = None,
    method: Annotated[DoctorMethod, typer.Option(help="Of new adapters, for a MODEL.")] = DoctorMethod.fixed,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers of a MODEL, as names or globs. Default: all-linear.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Of the model; auto is the checkpoint's own.")] = DtypeName.auto,
) -> None:
    """Prove with one small batch that every adapter is called, trains, acts and merges; exit code 1 if not."""
    from lrlora_ops.finetune.examined import examine_directory

    examine_directory(directory, model, method.value, targets, device, dtype.value, Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Outputs of finetune or demo.")],
    output: Annotated[Path, typer.Option(help="Directory for the page and the pictures.")] = Path("lrlora-report"),
    gpu: Annotated[str, typer.Option(help="Whose datasheet rates floors of time are computed with.")] = "H200",
) -> None:
    """Where the rank went: a page and pictures of one or several runs, and what padded LoRA would cost."""
    from lrlora_ops.finetune.reported import write_report

    write_report(runs, output, gpu, Console())


@app.command()
def env() -> None:
    """Versions, devices, backends and settings, for a report of a problem."""
    from lrlora_ops.finetune.environment import as_text, environment

    typer.echo(as_text(environment()))


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Directory with the config.json of a Hugging Face model.")],
    budget: Annotated[float, typer.Option(metavar="MEAN_RANK", help="Mean rank of a layer or an expert.")],
    max_rank: Annotated[int | None, typer.Option(help="Highest rank. Default: four times the mean.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a step, of one row.")] = 4096,
    gpu_memory: Annotated[float | None, typer.Option(metavar="GB", help="Say which ranks fit it.")] = None,
    gpu: Annotated[str, typer.Option(help="Whose datasheet rates the floors are computed with.")] = "H200",
    targets: Annotated[list[str] | None, typer.Option(help="Layers, as names or globs. Default: all-linear.")] = None,
) -> None:
    """Memory and floors of time of adapters before training, computed from config.json alone."""
    from lrlora_ops.finetune.planned import PlanSettings, print_plan

    most = math.ceil(4 * budget) if max_rank is None and math.isfinite(budget) else max_rank or 0
    print_plan(PlanSettings(model, budget, most, tokens, gpu_memory, gpu, tuple(targets or ["all-linear"])), Console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    table: Annotated[
        bool, typer.Option("--table", help="Print the tables of results files, the newest unless some are named.")
    ] = False,
) -> None:
    """Time this library beside its peers: what follows goes to pytest. Needs the source tree, and its bench extra."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "report.py").exists():
        raise CommandError(f"the benchmarks are not in {root}: they are part of the source tree, not of the package")
    suite = ["pytest", "benchmarks/", "--benchmark-only"]
    command = ["benchmarks.report", *map(os.path.abspath, context.args)] if table else [*suite, *context.args]
    raise typer.Exit(subprocess.run([sys.executable, "-m", *command], cwd=root).returncode)


def main() -> None:
    """Entry point of the ``lrlora`` command."""
    app()


if __name__ == "__main__":
    main()
