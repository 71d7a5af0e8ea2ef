"""One fine-tuning with one rank method, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lrlora_ops import Adapters, apply_lora
from lrlora_ops.expert_map import ExpertMap
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.evaluate import bits_per_byte
from lrlora_ops.finetune.history import History, traced_layers
from lrlora_ops.finetune.machine import describe
from lrlora_ops.finetune.progress import training_progress
from lrlora_ops.finetune.ranks import known, rank_list, stable_rank_list
from lrlora_ops.finetune.routing import routing_shares
from lrlora_ops.finetune.tokens import EncodedExamples, EncodedText, batches
from lrlora_ops.finetune.trainer import Recipe, Trainer
from lrlora_ops.methods import Method

ADAM_COPIES = 4  # a trained parameter has a gradient and two moments beside it


@dataclass(frozen=True)
class Texts:
    """What to train on and what to measure on.

    Attributes:
        train: Pairs of a stream of tokens, or of examples, and how many rows of a batch come from it.
        held_out: Texts by name, of which no part is trained on.
        seq_len: Tokens in a row, in training and in measuring.
        forgotten: Names of held-out texts of kinds that are not trained on: what the model should not unlearn.
    """

    train: Sequence[tuple[Tensor | Sequence[Tensor], int]]
    held_out: Mapping[str, EncodedText | EncodedExamples]
    seq_len: int
    forgotten: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in a batch."""
        return sum(rows for _, rows in self.train)

    @property
    def tokens_per_step(self) -> float:
        """Tokens in a batch without padding, in the mean."""
        return sum(
            rows * (self.seq_len if isinstance(source, Tensor) else sum(map(len, source)) / len(source))
            for source, rows in self.train
        )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte of every held-out text."""
        return {name: bits_per_byte(model, text, self.seq_len, self.rows) for name, text in self.held_out.items()}


@dataclass(frozen=True)
class ArmPlan:
    """One way to fine-tune a model.

    Attributes:
        name: In tables and progress bars.
        method: The method's settings for a run of so many steps, or those of several by pattern.
        targets: As ``apply_lora`` takes them.
        lora_alpha: As ``apply_lora`` takes it.
        dropout: As ``apply_lora`` takes it.
    """

    name: str
    method: Callable[[int], Method | Mapping[str, Method]]
    targets: str | Sequence[str] = "all-linear"
    lora_alpha: float | None = None
    dropout: float = 0.0

    def apply(self, model: nn.Module, steps: int, seed: int) -> Adapters:
        """Put new adapters into the model.

        Raises:
            CommandError: There is nothing to adapt.
        """
        torch.manual_seed(seed)
        try:
            return apply_lora(model, self.method(steps), self.targets, lora_alpha=self.lora_alpha, dropout=self.dropout)
        except ValueError as error:
            raise CommandError(str(error)) from error


@dataclass
class Arm:
    """A plan carried out on a model of its own, and what was measured on the way.

    Attributes:
        bits: Held-out bits per byte by text, after training.
        seconds: Of training alone.
        held: Bytes of adapters, gradients and optimizer state, at the start and at the end.
        gpu_bytes: Peak of memory allocated on the GPU, the model included; None on CPU.
        routing: Share of the rows of a held-out text that each expert gets, ``[E]`` by text and by adapter, after
            training; empty without adapted experts.
    """

    plan: ArmPlan
    recipe: Recipe
    model: Any
    adapters: Adapters
    bits: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    held: tuple[int, int] = (0, 0)
    gpu_bytes: int | None = None
    routing: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, plan: ArmPlan, recipe: Recipe, model: nn.Module, seed: int) -> Arm:
        """Put the plan's adapters into the model.

        Raises:
            CommandError: There is nothing to adapt.
        """
        return cls(plan, recipe, model, plan.apply(model, recipe.steps, seed))

    @property
    def parameters(self) -> int:
        """Parameters of the adapters, as many as they hold now."""
        return sum(parameter.numel() for parameter in self.adapters.parameters())

    @property
    def ranks(self) -> list[int]:
        """The rank of every layer, or of every expert in it."""
        return rank_list(self.adapters)

    @property
    def stable_ranks(self) -> list[float]:
        """Of every layer that a ``SincUpdate`` moves, or of every expert in it."""
        return known(stable_rank_list(self.adapters))

    @property
    def rank_by_layer(self) -> dict[str, int | float]:
        """The rank of every layer by name, for layers that have one rank each; a float for a stable rank."""
        return {name: rank.item() for name, rank in self.adapters.ranks().items() if rank.dim() == 0}

    @property
    def expert_ranks(self) -> dict[str, Tensor]:
        """int32 ``[E]`` on the host: the ranks of the experts, for layers that have them."""
        tables = {name: own.table for name, own in self.adapters.modules.items() if "" not in own.pools()}
        return {name: table.ranks.cpu() for name, table in tables.items()}

    @property
    def expert_map(self) -> ExpertMap | None:
        """Ranks and routing by layer and expert; None without adapted experts."""
        return ExpertMap.of(self.expert_ranks, self.routing) if self.expert_ranks else None

    def trainer(self) -> Trainer:
        """A new one for the adapters."""
        return Trainer(self.model, self.recipe, self.adapters)

    def train(
        self,
        texts: Texts,
        seed: int,
        console: Console,
        directory: Path,
        before: Mapping[str, float],
        trainer: Trainer | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train the adapters and measure the model; the same seed gives every arm the same batches.

        Args:
            texts: What to train and to measure on.
            seed: Of the batches.
            console: For the progress bar.
            directory: Gets the history of the run.
            before: Held-out bits per byte without adapters, for the history.
            trainer: Of these adapters; it may have made steps before, and goes on with the batches after them.
            after_step: Called after each step.
        """
        steps, device = self.recipe.steps, self.adapters.parameters()[0].device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        held_at_start = self._held()
        trainer = trainer or self.trainer()
        stream = islice(batches(texts.train, texts.seq_len, steps, seed), trainer.steps, None)
        history = self._history(texts, seed, directory, before, trainer.steps)
        with training_progress(console, self.plan.name, steps, texts.tokens_per_step, trainer.steps) as show:

            def on_step(loss: float) -> None:
                history.on_step(loss)
                show(loss, history.shown_ranks())
                after_step()

            start = time.perf_counter()
            trainer.run(stream, on_step, history.on_backward)
            self.seconds = time.perf_counter() - start
        self.held = held_at_start, self._held()
        if device.type == "cuda":
            self.gpu_bytes = torch.cuda.max_memory_allocated(device)
        self.bits = texts.measure(self.model)
        trained_on = {name: text for name, text in texts.held_out.items() if name not in texts.forgotten}
        self.routing = routing_shares(self.model, self.adapters, trained_on, texts.seq_len, texts.rows)
        history.end(
            bits=self.bits,
            routing={text: {name: own.tolist() for name, own in of.items()} for text, of in self.routing.items()},
            parameters=self.parameters,
            held=self.held,
            gpu_bytes=self.gpu_bytes,
        )

    def _history(
        self, texts: Texts, seed: int, directory: Path, before: Mapping[str, float], first_step: int
    ) -> History:
        history = History(directory, self.adapters, self.recipe.steps, first_step)
        history.begin(
            name=self.plan.name,
            machine=describe(self.adapters.parameters()[0].device),
            seed=seed,
            tokens=round(texts.tokens_per_step),
            before=dict(before),
            **traced_layers(self.adapters, texts.seq_len, texts.rows),
        )
        return history

    def _held(self) -> int:
        return ADAM_COPIES * sum(p.numel() * p.element_size() for p in self.adapters.parameters())
