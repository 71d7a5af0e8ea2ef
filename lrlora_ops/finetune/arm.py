"""One fine-tuning with one rank method, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor

from lrlora_ops import Adapters, apply_lora
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.evaluate import bits_per_byte
from lrlora_ops.finetune.progress import training_progress
from lrlora_ops.finetune.tokens import EncodedText, batches
from lrlora_ops.finetune.trainer import Recipe, train
from lrlora_ops.methods import Method

ADAM_COPIES = 4  # a trained parameter has a gradient and two moments beside it


@dataclass(frozen=True)
class Texts:
    """What to train on and what to measure on.

    Attributes:
        train: Pairs of a stream of tokens and how many rows of a batch come from it.
        held_out: Texts by name, of which no part is trained on.
        seq_len: Tokens in a row, in training and in measuring.
    """

    train: Sequence[tuple[Tensor, int]]
    held_out: dict[str, EncodedText]
    seq_len: int

    @property
    def rows(self) -> int:
        """Rows in a batch."""
        return sum(rows for _, rows in self.train)

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """Bits per byte of every held-out text."""
        return {name: bits_per_byte(model, text, self.seq_len, self.rows) for name, text in self.held_out.items()}


@dataclass
class Arm:
    """A method's adapters on a model of their own, and what was measured on the way.

    Attributes:
        bits: Held-out bits per byte by text, after training.
        seconds: Of training alone.
        held: Bytes of adapters, gradients and optimizer state, at the start and at the end.
        gpu_bytes: Peak of memory allocated on the GPU, the model included; None on CPU.
    """

    method: Method
    model: torch.nn.Module
    adapters: Adapters
    bits: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    held: tuple[int, int] = (0, 0)
    gpu_bytes: int | None = None

    @classmethod
    def prepare(cls, model: torch.nn.Module, method: Method, targets: str | Sequence[str], seed: int) -> Arm:
        """Put new adapters into the model.

        Raises:
            CommandError: There is nothing to adapt.
        """
        torch.manual_seed(seed)
        try:
            return cls(method, model, apply_lora(model, method, targets))
        except ValueError as error:
            raise CommandError(str(error)) from error

    @property
    def parameters(self) -> int:
        """Parameters of the adapters, as many as they hold now."""
        return sum(parameter.numel() for parameter in self.adapters.parameters())

    @property
    def ranks(self) -> dict[str, int]:
        return {name: int(rank) for name, rank in self.adapters.ranks().items()}

    def train(self, texts: Texts, recipe: Recipe, seed: int, console: Console) -> None:
        """Train the adapters and measure the model; the same seed gives every method the same batches."""
        device = self.adapters.parameters()[0].device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        held_at_start = self._held()
        stream = batches(texts.train, texts.seq_len, recipe.steps, seed)
        title = type(self.method).__name__
        with training_progress(console, title, recipe.steps, texts.rows * texts.seq_len, self.adapters) as on_step:
            start = time.perf_counter()
            train(self.model, stream, recipe, on_step, self.adapters)
            self.seconds = time.perf_counter() - start
        self.held = held_at_start, self._held()
        if device.type == "cuda":
            self.gpu_bytes = torch.cuda.max_memory_allocated(device)
        self.bits = texts.measure(self.model)

    def _held(self) -> int:
        return ADAM_COPIES * sum(p.numel() * p.element_size() for p in self.adapters.parameters())
