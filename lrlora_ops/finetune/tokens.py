"""Text as tokens: a tokenizer trained on the spot, documents as one stream, random training batches.

A token that is read but not to be predicted, of a prompt say, is stored as ``~token``, a negative number.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

    def rows(self, seq_len: int) -> list[Tensor]:
        """Windows of ``seq_len`` tokens, in which every token but the first of the text is predicted once."""
        # Neighbouring windows share a token: the last that one predicts is the first that the next one reads.
        return [self.tokens[start : start + seq_len] for start in range(0, len(self.tokens) - 1, seq_len - 1)]


@dataclass(frozen=True)
class EncodedExamples:
    """Prompts with their completions, or conversations: each a row of its own.

    Attributes:
        examples: int64 ``[T]`` each, on the host; what is not to be predicted as ``~token``.
        num_bytes: Length in UTF-8 of what is to be predicted.
    """

    examples: Sequence[Tensor]
    num_bytes: int

    @property
    def tokens(self) -> Tensor:
        """int64 ``[T]``: all examples as one stream, to be read and not to be learned from."""
        return inputs_and_labels(torch.cat(list(self.examples)))[0]

    def rows(self, seq_len: int) -> list[Tensor]:
        """The examples, which are cut to ``seq_len`` tokens already."""
        return list(self.examples)


def collate(rows: Sequence[Tensor]) -> Tensor:
    """int64 ``[rows, longest row]``: shorter rows get tokens at their end that nothing reads or predicts."""
    return pad_sequence(list(rows), batch_first=True, padding_value=~0)


def inputs_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads, and what it is to predict, which is -100 where nothing is."""
    return torch.where(batch < 0, ~batch, batch), batch.masked_fill(batch < 0, -100)


def encode(tokenizer: Any, documents: Sequence[str]) -> EncodedText:
    """The documents in order, each after the tokenizer's end-of-text (or begin-of-text) token if it has one."""
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    prefix = [] if separator is None else [separator]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in (*prefix, *document)], dtype=torch.int64)
    return EncodedText(tokens, sum(len(document.encode()) for document in documents))


def batches(
    sources: Sequence[tuple[Tensor | Sequence[Tensor], int]], seq_len: int, steps: int, seed: int
) -> Iterator[Tensor]:
    """Yield ``steps`` batches of random windows of texts, or of shuffled examples, the same ones for the same seed.

    Args:
        sources: Pairs of tokens ``[T]``, T >= seq_len, or of examples, and how many rows of each batch come from them.
        seq_len: Tokens in a row.
        steps: How many batches.
        seed: Of the windows' places and the examples' order.

    Yields:
        int64 ``[sum of rows, seq_len]``, or as long as the longest example in it.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [_shuffled(source, generator) for source, _ in sources]
    for _ in range(steps):
        rows: list[Tensor] = []
        for (source, count), examples in zip(sources, shuffled, strict=True):
            if isinstance(source, Tensor):
                starts = torch.randint(len(source) - seq_len + 1, (count,), generator=generator).tolist()
                rows += [source[start : start + seq_len] for start in starts]
            else:
                rows += islice(examples, count)
        yield collate(rows)


def _shuffled(examples: Tensor | Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """The examples without end, in another order each time."""
    while True:
        for index in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[index]
