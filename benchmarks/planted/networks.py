"""The networks of the planted tasks: residual blocks of two layers, dense or of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrlora_ops import RankTable, Routing, VariableRankLoRAGroupedLinear

MAX_RANK = 24


class Block(nn.Module):
    """``h + down(gelu(up(norm(h))))``, with frozen random weights of variance 1 / features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, elementwise_affine=False)
        self.up = nn.Linear(features, features, bias=False)
        self.down = nn.Linear(features, features, bias=False)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=features**-0.5).requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(nn.functional.gelu(self.up(self.norm(h))))


class ExpertsBlock(nn.Module):
    """``h + p_e down_e(gelu(up_e(norm(h))))``, where a frozen hash of the token chooses the expert e.

    The share of the tokens that an expert gets follows Zipf's law, in random order; its routing weight p_e is uniform
    from 0.3 to 1. The adapters are part of the block, of rank 0: up and down of an expert share a rank.
    """

    def __init__(self, features: int, num_experts: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, elementwise_affine=False)
        table = RankTable.uniform(num_experts, 0, MAX_RANK, num_projections=2)
        self.up, self.down = (
            VariableRankLoRAGroupedLinear(num_experts, features, features, table=table, projection=projection)
            for projection in (0, 1)
        )
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=features**-0.5)
        share = 1 / (1 + torch.randperm(num_experts))
        self.expert_of_token = torch.multinomial(share, vocabulary, replacement=True)
        self.routing_weight = torch.empty(num_experts).uniform_(0.3, 1.0)

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        experts = self.expert_of_token[tokens]
        routing = Routing.from_topk(experts[:, None], len(self.routing_weight))
        rows, offsets = routing.token_index, routing.group_offsets
        y = self.down(nn.functional.gelu(self.up(self.norm(h)[rows], offsets)), offsets)
        return h.index_add(0, rows, y * self.routing_weight[experts[rows], None])

    def importance(self) -> Tensor:
        """``[E]``: what an expert's error weighs in the mean square of the output, its load times ``p_e^2``."""
        load = torch.bincount(self.expert_of_token, minlength=len(self.routing_weight))
        return load / load.sum() * self.routing_weight.square()


class MixtureOfExperts(nn.Module):
    """Blocks of experts, each with a hash of its own."""

    def __init__(self, num_layers: int, features: int, num_experts: int, vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertsBlock(features, num_experts, vocabulary) for _ in range(num_layers))

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, tokens)
        return h
