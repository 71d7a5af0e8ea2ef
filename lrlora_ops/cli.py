"""The ``lrlora`` command: a demo on text that every machine has, and fine-tuning of a model of one's own."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

if missing := [
    name
    for name in ("typer", "rich", "jinja2", "matplotlib", "pydantic", "yaml", "transformers", "tokenizers")
    if not find_spec(name)
]:
    print(f"lrlora needs {', '.join(missing)}, not installed here: pip install 'lrlora_ops[cli]'", file=sys.stderr)
    raise SystemExit(2)

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from lrlora_ops.finetune.errors import CheckFailed, CommandError, DiskFull, OutOfMemory, Stopped, disk_is_full
from lrlora_ops.finetune.options import with_options

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
        except (CommandError, CheckFailed) as error:
            exit_with(str(error), error.code)
        except OSError as error:
            if disk_is_full(error):
                exit_with(f"the disk is full ({error}): make room, or choose another directory", DiskFull.code)
            exit_with(str(error), CommandError.code)
        except torch.OutOfMemoryError:
            advice = "lower --batch-size or --seq-len, or add --dtype bfloat16"
            exit_with(f"the GPU's memory is full; nothing is saved: {advice}", OutOfMemory.code)
        except KeyboardInterrupt:
            exit_with("stopped", Stopped.code)
        sys.exit()


def exit_with(message: str, code: int) -> NoReturn:
    """Say it in one line, and exit."""
    typer.echo(f"lrlora: {' '.join(message.split())}", err=True)
    sys.exit(code)


app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Of the adapters, the batches and the sampled ranks.")]


class MethodName(str, Enum):
    fixed = "fixed"
    learned = "learned"
    dynamic = "dynamic"
    sinc = "sinc"


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
    dense: Annotated[
        bool, typer.Option("--dense", help="A model without experts: fixed ranks, learned ranks, SincUpdate.")
    ] = False,
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
@with_options
def finetune(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings, as in lrlora schema; options override it.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped, as its --output.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True, metavar="")] = None,
    **options: Any,
) -> None:
    """Fine-tune a causal language model on text or examples, and measure it on what was held out. Exit codes: 0 done,
    1 a check failed, 2 bad input, 3 disk full, 4 loss not finite, 5 out of GPU memory, 130 Ctrl-C (it saves first)."""
    from lrlora_ops.finetune.config_file import read_config
    from lrlora_ops.finetune.own_text import resume_fine_tuning, run_fine_tuning

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if resume:
        if config or given or more:
            raise CommandError(
                f"--resume goes on with the run's own settings: leave out {', '.join(given) or '--config'}"
            )
        resume_fine_tuning(resume, Console())
        return
    if more:
        if not options["train"]:
            raise CommandError(f"{more[0]} comes after no option that it could be for: put --train before it")
        options["train"] = [*options["train"], *more]
    run_fine_tuning(read_config(config, options), Console())


@app.command()
def schema() -> None:
    """Print the JSON schema of the files for finetune --config."""
    from lrlora_ops.finetune.config import FineTuneConfig

    typer.echo(json.dumps(FineTuneConfig.model_json_schema(), indent=2))


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
    method: Annotated[MethodName, typer.Option(help="Of new adapters, for a MODEL.")] = MethodName.fixed,
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


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(help="Directory with the config.json of a Hugging Face model.")],
    tokens: Annotated[int, typer.Option(help="Tokens in a step: rows of a batch times tokens in a row.")] = 4096,
    rank: Annotated[int, typer.Option(help="The largest rank that a layer or an expert may have.")] = 16,
    targets: Annotated[list[str] | None, typer.Option(help="Layers, as names or globs. Default: all-linear.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of the model; auto is the config's own.")] = DtypeName.auto,
    method: Annotated[
        MethodName, typer.Option(help="sinc has kernels of its own; all others launch the same.")
    ] = MethodName.fixed,
    again: Annotated[bool, typer.Option("--again", help="Also what has been tuned before.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile. Default: the cores, at most 16.")] = None,
) -> None:
    """Find the fastest tiles of the kernels for a model's shapes on this machine's GPU, and keep them."""
    from lrlora_ops.finetune.tuned import TuneSettings, tune_model

    layers = (model, tokens, rank, tuple(targets or ["all-linear"]), dtype.value)
    tune_model(TuneSettings(*layers, method.value, again, jobs), Console())


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]", help="Directory with a config.json; or options for pytest, for the suite."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="M,K,N", help="A linear layer: rows, inputs, outputs.")
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(metavar="T,E,k,H,I", help="Experts: tokens, experts, experts of a token, widths."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a MODEL's step. Default: 4096 on a GPU, else 512.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of every layer and expert. Default: 16.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Layers of MODEL. Default: all-linear.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="auto: MODEL's own, or bf16 on a GPU, else fp32.")] = DtypeName.auto,
    device: Device = "auto",
    table: Annotated[
        bool, typer.Option("--table", help="Print the tables of results files, the newest unless some are named.")
    ] = False,
) -> None:
    """Time this library beside its peers on shapes of one's own, or as the suite does. Needs the source tree."""
    from lrlora_ops.finetune.benched import BenchSettings, run_bench

    layers = (tuple(words or []), tuple(shape or []), tuple(experts or []))
    settings = BenchSettings(*layers, tokens, rank, tuple(targets or []), dtype.value, device, table)
    raise typer.Exit(run_bench(settings, Console()))


def main() -> None:
    """Entry point of the ``lrlora`` command."""
    app()


if __name__ == "__main__":
    main()
