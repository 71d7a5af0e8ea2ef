"""What the demo's models are pretrained, tuned and measured on, and the tokenizer for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from lrlora_ops.finetune import corpus
from lrlora_ops.finetune.arm import Texts
from lrlora_ops.finetune.tokens import encode, sample, train_tokenizer

VOCAB_SIZE = 1024
SEQ_LEN = 128


@dataclass(frozen=True)
class DemoTexts:
    """A tokenizer trained on the spot; tokens to pretrain on; texts to fine-tune on and to measure on."""

    tokenizer: Any
    source: Tensor
    tuning: Texts


def read_texts(characters: int, held_out_characters: int, tuning_rows: int, console: Console) -> DemoTexts:
    """Python's library source to pretrain on; its reference text and its Unicode tables to fine-tune on.

    Args:
        characters: How much of each text is encoded to train on.
        held_out_characters: How much of each held-out text is measured on.
        tuning_rows: Rows of a fine-tuning batch from each of its two texts.
        console: Sizes and hashes are printed there.
    """
    source = corpus.library_source()
    reference, unicode = corpus.reference_text(source), corpus.unicode_lines()
    texts = (source, reference, unicode)
    for text in texts:
        console.print(f"  {text}", highlight=False)
    tokenizer = train_tokenizer(sample(source.train, min(characters, 2_000_000)), VOCAB_SIZE)
    # Near to what the model is pretrained on, and far from it.
    names = (source.name, f"{reference.name} (near)", f"{unicode.name} (far)")
    held_out = {
        name: encode(tokenizer, sample(text.held_out, held_out_characters))
        for name, text in zip(names, texts, strict=True)
    }
    tokens, *tuning = (encode(tokenizer, sample(text.train, characters)).tokens for text in texts)
    streams = [(stream, tuning_rows) for stream in tuning]
    return DemoTexts(tokenizer, tokens, Texts(streams, held_out, SEQ_LEN, forgotten=names[:1]))
