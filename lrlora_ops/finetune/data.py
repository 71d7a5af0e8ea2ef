"""Text as tokens: a byte-level tokenizer trained on the spot, random training batches, held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on ``documents``."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        documents, vocab_size=vocab_size, special_tokens=[SEPARATOR], show_progress=False, min_frequency=2
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=SEPARATOR)


@dataclass(frozen=True)
class EncodedText:
    """Documents as one stream of tokens, each after a separator.

    Attributes:
        tokens: int64 ``[T]`` on the host.
        num_bytes: Length of the text in UTF-8, without separators.
    """

    tokens: Tensor
    num_bytes: int


def encode(tokenizer: Any, documents: Sequence[str]) -> EncodedText:
    """The documents in order, each preceded by the tokenizer's end-of-text (or begin-of-text) token if it has one."""
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    prefix = [] if separator is None else [separator]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in (*prefix, *document)], dtype=torch.int64)
    return EncodedText(tokens, sum(len(document.encode()) for document in documents))


def batches(streams: Sequence[tuple[Tensor, int]], seq_len: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` batches of random windows, the same for the same seed.

    Args:
        streams: Pairs of tokens ``[T]``, T >= seq_len, and how many rows of each batch come from them.
        seq_len: Tokens in a row.

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


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: EncodedText, seq_len: int, batch_size: int) -> float:
    """Bits that the model needs for one byte of ``text``, read in windows of ``seq_len`` tokens.

    Every token but the first is predicted once, from those before it in its window. The model is left in the
    mode (training or evaluation) that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Windows share one token, for the first token of a window is not predicted in it.
    starts = range(0, len(text.tokens) - 1, seq_len - 1)
    windows = [text.tokens[start : start + seq_len] for start in starts]
    nats = 0.0
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        labels = torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-100).to(device)
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        nats += loss.double().item() * int((labels[:, 1:] != -100).sum())
    model.train(was_training)
    return nats / math.log(2) / text.num_bytes
