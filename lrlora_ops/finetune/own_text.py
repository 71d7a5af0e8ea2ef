"""Fine-tuning of the user's model on the user's text files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lrlora_ops import FixedRank, LearnedRank
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import comes_back, print_checks
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.machine import describe, peak_memory, pick_device
from lrlora_ops.finetune.outcome import draw_ranks, print_ranks, print_results
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.finetune.tokens import encode
from lrlora_ops.finetune.trainer import Recipe


@dataclass(frozen=True)
class FineTuneSettings:
    """The options of ``lrlora finetune``; see its help.

    Raises:
        CommandError: A number is out of its range.
    """

    model: Path
    files: tuple[Path, ...]
    output: Path
    learned: bool
    rank: float
    max_rank: int | None
    targets: tuple[str, ...]
    steps: int
    batch_size: int
    seq_len: int
    lr: float
    eval_fraction: float
    seed: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("rank", 0 < self.rank < math.inf, "above 0"),
            ("rank", self.learned or self.rank == int(self.rank), "a whole number with --method fixed"),
            ("max_rank", self.learned or self.max_rank is None, "left out with --method fixed"),
            ("max_rank", self.max_rank is None or self.max_rank >= self.rank, f"at least the rank, {self.rank:g}"),
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("seq_len", self.seq_len >= 2, "at least 2"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("eval_fraction", 0 < self.eval_fraction < 1, "between 0 and 1"),
        ):
            if not valid:
                option = name.replace("_", "-")
                raise CommandError(f"--{option} is {getattr(self, name)}; it must be {wanted}")

    @property
    def plan(self) -> ArmPlan:
        """FixedRank, or LearnedRank with ``max_rank`` at four times the mean unless it is given."""
        if not self.learned:
            return ArmPlan("FixedRank", lambda _: FixedRank(int(self.rank)), self.targets)
        max_rank = self.max_rank or math.ceil(4 * self.rank)
        return ArmPlan(
            "LearnedRank", lambda steps: LearnedRank(self.rank, max_rank, steps, seed=self.seed), self.targets
        )


def run_fine_tuning(settings: FineTuneSettings, console: Console) -> None:
    """Train, measure, save, check.

    Raises:
        CommandError: The input cannot be used, or the run cannot go on.
        CheckFailed: What was saved is not what was trained.
        KeyboardInterrupt: The user stopped it; the adapter is saved.
    """
    device = pick_device(settings.device)
    documents = [read_text(path) for path in settings.files]
    prepare_output(settings.output)
    console.print(describe(device), style="bold", highlight=False)
    texts, bits = train_and_save(documents, settings, device, console)
    model, _ = load_pretrained(settings.model, device, settings.dtype)
    print_checks(console, comes_back(settings.output, settings.plan, settings.steps, model, texts, bits))
    console.print(f"  {settings.output}: the adapter, its ranks as text and as pictures; {peak_memory(device)}")


def train_and_save(
    documents: Sequence[str], settings: FineTuneSettings, device: torch.device, console: Console
) -> tuple[Texts, dict[str, float]]:
    """Train and leave the adapter, its ranks and their picture in the output directory.

    Returns:
        The texts and what they were measured at; not the model, so that there is memory for another copy of it.
    """
    model, tokenizer = load_pretrained(settings.model, device, settings.dtype)
    texts = split_texts(documents, tokenizer, model, settings, console)
    arm = Arm.prepare(settings.plan, Recipe(settings.steps, settings.lr), model, settings.seed)
    before = texts.measure(model)
    try:
        arm.train(texts, settings.seed, console, settings.output, before)
    except KeyboardInterrupt:
        arm.adapters.save(settings.output)
        console.print(f"interrupted; the adapter as it was is saved in {settings.output}", style="yellow")
        raise
    arm.adapters.save(settings.output)
    print_results(console, before, [arm])
    print_ranks(console, arm)
    draw_ranks([arm], settings.output)
    with (settings.output / "ranks.txt").open("w") as file:
        print_ranks(Console(file=file, width=200), arm)
    return texts, arm.bits


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        CommandError: It is missing, empty, or no UTF-8 text.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text: convert it, or leave it out") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror}): give text files with --train") from None
    if "\0" in text:
        raise CommandError(f"{path} is a binary file: give text files with --train")
    if not text.strip():
        raise CommandError(f"{path} is empty: leave it out, or put text into it")
    return text


def prepare_output(directory: Path) -> None:
    """Make the directory, before hours are spent on what could not be saved.

    Raises:
        CommandError: It holds something already, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        occupied = any(directory.iterdir())
    except OSError as error:
        raise CommandError(f"{directory} cannot be written ({error.strerror}): choose another --output") from None
    if occupied:
        raise CommandError(f"{directory} is not empty: choose another --output, or empty it")


def split_texts(
    documents: Sequence[str], tokenizer: Any, model: Any, settings: FineTuneSettings, console: Console
) -> Texts:
    """The end of each document, from a new line on, is held out.

    Raises:
        CommandError: The text is too short, or the rows are too long for the model.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or settings.seq_len
    if settings.seq_len > longest:
        raise CommandError(f"--seq-len is {settings.seq_len}, but the model reads at most {longest} tokens: lower it")
    parts = [split_at_line(document, settings.eval_fraction) for document in documents]
    train = encode(tokenizer, [part for part, _ in parts if part])
    held_out = encode(tokenizer, [part for _, part in parts if part])
    if len(train.tokens) < settings.seq_len or len(held_out.tokens) < 2:
        raise CommandError(
            f"the text is too short: {len(train.tokens)} tokens to train on, {len(held_out.tokens)} held out, and "
            f"--seq-len is {settings.seq_len}; add text, or lower --seq-len"
        )
    console.print(
        f"  {len(train.tokens):,} tokens ({train.num_bytes / 1e3:,.1f} kB) to train on, "
        f"{len(held_out.tokens):,} ({held_out.num_bytes / 1e3:,.1f} kB) held out; "
        f"{settings.steps} steps of {settings.batch_size} x {settings.seq_len} tokens",
        highlight=False,
    )
    return Texts([(train.tokens, settings.batch_size)], {"held-out text": held_out}, settings.seq_len)


def split_at_line(text: str, fraction: float) -> tuple[str, str]:
    """``(train, held_out)``: about this fraction of the text, its end, is held out."""
    at = min(int(len(text) * (1 - fraction)), len(text) - 1)
    newline = text.find("\n", at)
    cut = newline + 1 if 0 <= newline < len(text) - 1 else at
    return text[:cut], text[cut:]
