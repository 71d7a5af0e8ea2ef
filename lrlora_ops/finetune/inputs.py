"""What a run trains on and is measured on, from the user's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lrlora_ops.finetune.arm import Texts
from lrlora_ops.finetune.config import FineTuneConfig
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.files import read_text
from lrlora_ops.finetune.records import Record, encode_records, read_records
from lrlora_ops.finetune.tokens import EncodedExamples, EncodedText, encode

HELD_OUT = "held-out text"


@dataclass(frozen=True)
class TextInputs:
    """Texts, which are read in windows: to train on, and held out."""

    train: Sequence[str]
    held_out: Sequence[str]

    def encode(self, tokenizer: Any, config: FineTuneConfig, console: Console) -> tuple[EncodedText, EncodedText]:
        """Both as tokens.

        Raises:
            CommandError: There is too little.
        """
        train, held_out = encode(tokenizer, self.train), encode(tokenizer, self.held_out)
        if len(train.tokens) < config.seq_len or len(held_out.tokens) < 2:
            raise CommandError(
                f"the text is too short: {len(train.tokens)} tokens to train on, {len(held_out.tokens)} held out, and "
                f"--seq-len is {config.seq_len}; add text, or lower --seq-len"
            )
        return train, held_out


@dataclass(frozen=True)
class ExampleInputs:
    """Prompts with completions, or conversations, each a row of its own: to train on, and held out."""

    train: Sequence[Record]
    held_out: Sequence[Record]

    def encode(
        self, tokenizer: Any, config: FineTuneConfig, console: Console
    ) -> tuple[EncodedExamples, EncodedExamples]:
        """Both as tokens; says how many had to be cut.

        Raises:
            CommandError: Nothing is left of one of them, or the tokenizer cannot encode them.
        """
        train, train_cut = encode_records(tokenizer, self.train, config.seq_len)
        held_out, held_out_cut = encode_records(tokenizer, self.held_out, config.seq_len)
        given, left = len(self.train) + len(self.held_out), len(train.examples) + len(held_out.examples)
        if not train.examples or not held_out.examples:
            raise CommandError(
                f"of {given} examples {len(train.examples)} are left to train on and {len(held_out.examples)} held "
                f"out, and each needs one at least: add examples, or raise --seq-len, {config.seq_len}, if they are "
                "longer"
            )
        if cut := train_cut + held_out_cut:
            dropped = f"; {given - left} of them dropped, for their prompt alone fills it" if left < given else ""
            console.print(
                f"  {cut} of {given} examples are longer than --seq-len, {config.seq_len}, and cut{dropped}",
                style="yellow",
            )
        return train, held_out


Inputs = TextInputs | ExampleInputs


def read_inputs(paths: Sequence[Path], fraction: float) -> Inputs:
    """Of each text file, and of the lines of all ``.jsonl`` files, this fraction at the end is held out.

    Raises:
        CommandError: A file cannot be read, or there are both texts and examples.
    """
    train, held_out = [], []
    texts: list[str] = []
    examples: list[Record] = []
    for path in paths:
        if path.suffix == ".jsonl":
            records = read_records(path)
            texts += [record.values["text"] for record in records if record.kind == "text"]
            examples += [record for record in records if record.kind != "text"]
        else:
            head, tail = split_at_line(read_text(path), fraction)
            train.append(head)
            held_out.append(tail)
    if examples and (texts or train):
        raise CommandError(
            f"--train has both text and {examples[0].kind} ({examples[0].place}): train on one of them, or write the "
            "text as prompt and completion, with an empty prompt"
        )
    if examples:
        at = _split_place(len(examples), fraction)
        return ExampleInputs(examples[:at], examples[at:])
    at = _split_place(len(texts), fraction)
    return TextInputs(
        [part for part in (*train, *texts[:at]) if part], [part for part in (*held_out, *texts[at:]) if part]
    )


def _split_place(count: int, fraction: float) -> int:
    return min(int(count * (1 - fraction)), max(count - 1, 0))


def split_at_line(text: str, fraction: float) -> tuple[str, str]:
    """``(train, held_out)``: about this fraction of the text, its end, is held out."""
    at = min(int(len(text) * (1 - fraction)), len(text) - 1)
    newline = text.find("\n", at)
    cut = newline + 1 if 0 <= newline < len(text) - 1 else at
    return text[:cut], text[cut:]


def encode_inputs(inputs: Inputs, tokenizer: Any, model: Any, config: FineTuneConfig, console: Console) -> Texts:
    """As tokens, with a line on how much there is.

    Raises:
        CommandError: There is too little, or the rows are too long for the model.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or config.seq_len
    if config.seq_len > longest:
        raise CommandError(f"--seq-len is {config.seq_len}, but the model reads at most {longest} tokens: lower it")
    train, held_out = inputs.encode(tokenizer, config, console)
    console.print(
        f"  {len(train.tokens):,} tokens ({train.num_bytes / 1e3:,.1f} kB to learn), "
        f"{len(held_out.tokens):,} ({held_out.num_bytes / 1e3:,.1f} kB) held out; "
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens at most",
        highlight=False,
    )
    source = train.tokens if isinstance(train, EncodedText) else train.examples
    return Texts([(source, config.batch_size)], {HELD_OUT: held_out}, config.seq_len)
