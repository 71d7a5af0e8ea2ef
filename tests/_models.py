"""A small model whose layers are named as in a language model, and adapters in it that do something."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrlora_ops import Adapters, VariableRankLoRALinear


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 20), "down": nn.Linear(20, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x).tanh() * self.k_proj(x)
        return x + self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    """Two blocks, with an embedding and a head that can be tied."""

    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(12, 30, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


BLOCK = ["q_proj", "k_proj", "mlp.up", "mlp.down"]
ALL = [f"layers.{i}.{name}" for i in range(2) for name in BLOCK]
IDS = torch.arange(24).view(3, 8)


def trained(model: nn.Module) -> nn.Module:
    """Adapters that do something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, VariableRankLoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def optimize(loss: Tensor, adapters: Adapters, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step as a training loop does it; the loss as a number."""
    optimizer.zero_grad()
    loss.backward()
    adapters.step()
    optimizer.step()
    return loss.item()
