"""Which experts a text is routed to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops import Adapters
from lrlora_ops.finetune.tokens import EncodedExamples, EncodedText
from lrlora_ops.modules._experts import ExpertsAdapter

MOST_WINDOWS = 32


@torch.no_grad()
def routing_shares(
    model: nn.Module,
    adapters: Adapters,
    texts: Mapping[str, EncodedText | EncodedExamples],
    seq_len: int,
    batch_size: int,
) -> dict[str, dict[str, Tensor]]:
    """The share of a text's rows that each expert gets, by text and by adapter of experts.

    A token counts once for each expert that it visits. Read are the first windows of ``seq_len`` tokens, 32 at most.

    Returns:
        fp64 ``[E]`` with a sum of 1, on the host; nothing at all for a model without adapted experts.
    """
    experts = {name: module for name, module in adapters.modules.items() if isinstance(module, ExpertsAdapter)}
    if not experts:
        return {}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    shares = {}
    for text, encoded in texts.items():
        counts = {name: torch.zeros(module.table.num_experts, device=device) for name, module in experts.items()}
        hooks = [module.register_forward_pre_hook(_Counter(counts[name])) for name, module in experts.items()]
        windows = max(len(encoded.tokens) // seq_len, 1)
        rows = encoded.tokens[: windows * seq_len].view(windows, -1)[:MOST_WINDOWS]
        for batch in rows.split(batch_size):
            model(input_ids=batch.to(device))
        for hook in hooks:
            hook.remove()
        shares[text] = {name: (count.double() / count.sum()).cpu() for name, count in counts.items()}
    model.train(was_training)
    return shares


class _Counter:
    """Adds up the rows of each expert; an index of the number of experts means "not here"."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, _, top_k_index, _ = arguments
        num_experts = len(self.counts)
        self.counts += torch.bincount(top_k_index.flatten(), minlength=num_experts)[:num_experts]
