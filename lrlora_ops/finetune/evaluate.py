"""How well a model predicts text, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from lrlora_ops.finetune.tokens import EncodedExamples, EncodedText, collate, inputs_and_labels


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: EncodedText | EncodedExamples, seq_len: int, batch_size: int) -> float:
    """Bits that the model needs for one byte of ``text``, read in rows of ``seq_len`` tokens.

    Every token but the first of a text, or that is to be predicted in an example, is predicted once, from those before
    it in its row. The model is left in the mode (training or evaluation) that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = text.rows(seq_len)
    nats = 0.0
    for first in range(0, len(rows), batch_size):
        input_ids, labels = inputs_and_labels(collate(rows[first : first + batch_size]).to(device))
        loss = model(input_ids=input_ids, labels=labels).loss
        nats += float(loss) * int((labels[:, 1:] != -100).sum())
    model.train(was_training)
    return nats / math.log(2) / text.num_bytes
