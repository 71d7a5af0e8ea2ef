"""How well a model predicts text, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from lrlora_ops.finetune.tokens import EncodedText


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: EncodedText, seq_len: int, batch_size: int) -> float:
    """Bits that the model needs for one byte of ``text``, read in windows of ``seq_len`` tokens.

    Every token but the first of the text is predicted once, from those before it in its window. The model is
    left in the mode (training or evaluation) that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Neighbouring windows share a token: the last that one predicts is the first that the next one reads.
    starts = range(0, len(text.tokens) - 1, seq_len - 1)
    windows = [text.tokens[start : start + seq_len] for start in starts]
    nats = 0.0
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        labels = nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-100).to(device)
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        nats += float(loss) * int((labels[:, 1:] != -100).sum())
    model.train(was_training)
    return nats / math.log(2) / text.num_bytes
