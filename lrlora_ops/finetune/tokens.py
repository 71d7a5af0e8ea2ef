"""Text as tokens: a tokenizer trained on the spot, documents as one stream, random training batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"


def sample(documents: Sequence[str], num_characters: int) -> list[str]:
    """Documents in random order, always the same one, cut off after ``num_characters``."""
    taken = []
    for document in random.Random(0).sample(documents, len(documents)):
        if num_characters <= 0:
            break
        taken.append(document[:num_characters])
        num_characters -= len(document)
    return taken


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on ``documents``; it can encode any text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[SEPARATOR], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=SEPARATOR)


@dataclass(frozen=True)
class EncodedText:
    """Documents as one stream of tokens.

    Attributes:
        tokens: int64 ``[T]`` on the host.
        num_bytes: Length of the text in UTF-8, without separators.
    """

    tokens: Tensor
    num_bytes: int


def encode(tokenizer: Any, documents: Sequence[str]) -> EncodedText:
    """The documents in order, each after the tokenizer's end-of-text (or begin-of-text) token if it has one."""
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    prefix = [] if separator is None else [separator]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in (*prefix, *document)], dtype=torch.int64)
    return EncodedText(tokens, sum(len(document.encode()) for document in documents))


def batches(streams: Sequence[tuple[Tensor, int]], seq_len: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` batches of random windows, the same ones for the same seed.

    Args:
        streams: Pairs of tokens ``[T]``, T >= seq_len, and how many rows of each batch come from them.
        seq_len: Tokens in a row.
        steps: How many batches.
        seed: Of the windows' places.

    Yields:
        int64 ``[sum of rows, seq_len]``.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = []
        for tokens, count in streams:
            starts = torch.randint(len(tokens) - seq_len + 1, (count,), generator=generator).tolist()
            rows += [tokens[start : start + seq_len] for start in starts]
        yield torch.stack(rows)
