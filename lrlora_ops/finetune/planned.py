"""``lrlora plan``: what adapters of a model would cost, from its config.json alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrlora_ops._coverage import kind_of
from lrlora_ops._targets import find_targets
from lrlora_ops._trace import Trace, trace
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.gpus import GPUS, known_gpu
from lrlora_ops.finetune.pretrained import quiet_transformers
from lrlora_ops.plan import ARMS, Gpu, Layer, largest_rank, learning, owned

_SPARE = 0.9  # of a GPU's memory: the rest is for the allocator's gaps, gradients on their way and workspaces


@dataclass(frozen=True)
class PlanSettings:
    """The options of ``lrlora plan``; see its help.

    Raises:
        CommandError: A number is out of its range, or the GPU is unknown.
    """

    model: Path
    mean_rank: float
    max_rank: int
    tokens: int
    memory: float | None
    gpu: str
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("budget", 0 < self.mean_rank < math.inf, "above 0"),
            ("max-rank", self.max_rank >= self.mean_rank, f"at least the budget, {self.mean_rank:g}"),
            ("tokens", self.tokens >= 2, "at least 2"),
            ("gpu-memory", self.memory is None or 0 < self.memory < math.inf, "above 0"),
            ("gpu", known_gpu(self.gpu) is not None, f"one of {', '.join(GPUS)}"),
        ):
            if not valid:
                value = {"budget": self.mean_rank, "gpu-memory": self.memory}.get(name)
                shown = value if value is not None else getattr(self, name.replace("-", "_"))
                raise CommandError(f"--{name} is {shown}; it must be {wanted}")


def print_plan(settings: PlanSettings, console: Console) -> None:
    """Print the tables, and what a GPU of that memory could hold.

    Raises:
        CommandError: The model cannot be read, or the targets do not fit it.
    """
    found = traced(settings.model, settings.targets, settings.tokens)
    gpu = known_gpu(settings.gpu)
    assert gpu is not None
    console.print(
        f"computed, not measured: {settings.tokens:,} tokens in a step, mean rank {settings.mean_rank:g}, at most "
        f"{settings.max_rank}; times are floors at {settings.gpu}'s datasheet rates, {gpu.bandwidth / 1e12:g} TB/s and "
        f"{gpu.flops / 1e12:g} TFLOP/s",
        highlight=False,
    )
    tables = (memory_table(found.layers, settings), time_table(found.layers, settings, gpu))
    for table in (*tables, arms_table(found.layers, settings)):
        console.print(table, highlight=False)
        console.print()
    console.print(
        f"beside them, without activation checkpointing: weights {_gb(found.weights)}, activations {_gb(found.saved)}, "
        f"logits and loss {_gb(found.logits)} GB",
        highlight=False,
    )
    if settings.memory is not None:
        console.print(advice(found, settings.memory), highlight=False)


def traced(directory: Path, targets: Sequence[str], tokens: int) -> Trace:
    """The layers of a model whose config.json is in the directory.

    Raises:
        CommandError: There is none, it is no causal language model's, or the targets do not fit it.
    """
    return traced_modules(directory, targets, tokens)[0]


def traced_modules(
    directory: Path, targets: Sequence[str], tokens: int, dtype: torch.dtype | None = None
) -> tuple[Trace, dict[str, nn.Module], torch.dtype]:
    """The layers, the modules on the meta device that they are, by name, and the dtype that the config names.

    Args:
        directory: Of the model.
        targets: Patterns of ``find_targets``.
        tokens: In a step.
        dtype: To trace the model in; None for the config's own.

    Raises:
        CommandError: As ``traced``.
    """
    if not (directory / "config.json").is_file():
        raise CommandError(f"{directory} has no config.json: give the directory of a Hugging Face model")
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        own = config.dtype or torch.bfloat16
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or own)
        modules = find_targets(model, list(targets))
        return trace(model, modules, tokens), modules, own
    except Exception as error:  # transformers raises many kinds for a config that is damaged or of another kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(
            f"{directory} cannot be planned as a causal language model: {reason[0]}; give another MODEL"
        ) from error


def distinct_layers(directory: Path, targets: Sequence[str], tokens: int, dtype: str) -> list[tuple[nn.Module, Layer]]:
    """A layer of each size, with its module on the meta device, in a dtype by its name, or "auto" for the config's own.

    Raises:
        CommandError: As ``traced``.
    """
    # Sizes are asked for: bf16 is what experts are traced in on every version of torch.
    found, modules, own = traced_modules(directory, targets, tokens, torch.bfloat16)
    wanted = own if dtype == "auto" else getattr(torch, dtype)
    kinds = {(x.num_experts, x.projections, x.tokens, x.rows): x for x in reversed(found.layers)}
    return [(modules[layer.name].to(wanted), layer) for layer in reversed(kinds.values())]


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers whose names differ in numbers alone, and all of them."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(kind_of(layer.name), []).append(layer)
    return kinds | {"all": list(layers)}


def memory_table(layers: Sequence[Layer], settings: PlanSettings) -> Table:
    """Of each kind of layer at the mean rank; an input that several kinds read counts in each, and in all once."""
    table = _table(
        "MB held by components as owned", "layers", "number", "parameters", "A, B", "grads", "AdamW", "saved"
    )
    for kind, members in by_kind(layers).items():
        held = owned(members, settings.mean_rank, settings.max_rank)
        parameters = sum(layer.parameters(settings.mean_rank) for layer in members)
        sizes = (held.adapters, held.gradients, held.optimizer, held.saved)
        table.add_row(kind, f"{len(members):,}", f"{parameters:,.0f}", *(f"{size / 1e6:,.1f}" for size in sizes))
    return table


def time_table(layers: Sequence[Layer], settings: PlanSettings, gpu: Gpu) -> Table:
    """Floors of a step of each kind of layer, the frozen products and what adapters add to them."""
    mean, most = settings.mean_rank, settings.max_rank
    added = ("+ adapters", "+ padded to max", "+ PEFT at mean", "+ SincUpdate at mean")
    table = _table("ms in a step, at the least", "layers", "frozen", *added)
    for kind, members in by_kind(layers).items():
        costs = (
            [layer.base_cost() for layer in members],
            [layer.lora_cost(mean) for layer in members],
            [layer.lora_cost(most) for layer in members],
            [layer.peft_cost(mean) for layer in members],
            [cost for layer in members for cost in (layer.sinc_product_cost(), layer.sinc_passes_cost(mean))],
        )
        table.add_row(kind, *(f"{sum(cost.milliseconds(gpu) for cost in arm):,.2f}" for arm in costs))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def arms_table(layers: Sequence[Layer], settings: PlanSettings) -> Table:
    """What all adapters hold, by how their ranks are held."""
    table = _table("GB held by all adapters", "adapters", "A, B", "grads", "AdamW", "saved", "buffer", "sum")
    for name, arm in ARMS.items():
        held = arm(layers, settings.mean_rank, settings.max_rank)
        sizes = (held.adapters, held.gradients, held.optimizer, held.saved, held.buffer, held.total)
        table.add_row(name, *map(_gb, sizes))
    return table


def advice(found: Trace, memory: float) -> str:
    """The largest ranks that a GPU of so many GB holds beside the model."""
    free = _SPARE * memory * 1e9 - found.weights - found.saved - found.logits
    most = min(min(k, n) for layer in found.layers for k, n in layer.projections)
    if owned(found.layers, 0, 0).total > free:
        return (
            f"{memory:g} GB do not hold the model and a step of it: lower --tokens, use activation checkpointing, "
            "quantise the weights, or divide the model among GPUs"
        )
    fixed = largest_rank(lambda rank: owned(found.layers, rank, min(4 * rank, most)).total <= free, most)
    learned = largest_rank(lambda rank: learning(found.layers, rank, rank).total <= free, most)
    dynamic = f", DynamicRank with max_rank {min(4 * fixed, most)}" if any(x.is_experts for x in found.layers) else ""
    return (
        f"{memory:g} GB hold, beside the model and with a tenth to spare: FixedRank({fixed}){dynamic}; or LearnedRank "
        f"with max_rank {learned}, of which a mean_rank of {learned // 4} is a quarter"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f}"
