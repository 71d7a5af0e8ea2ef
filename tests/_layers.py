"""Base layers of every kind that VariableRankLoRALinear can be put around."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lrlora_ops import VariableRankLoRALinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def layer(in_features=37, out_features=19, *, trained=True, **options) -> VariableRankLoRALinear:
    torch.manual_seed(0)
    made = VariableRankLoRALinear(in_features, out_features, **options)
    if trained:
        nn.init.normal_(made.lora_B, std=0.3)
    return made


class Scaled(nn.Module):
    """A layer with a forward of its own, no ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(x, self.weight))


class Quantised(nn.Module):
    """int8 weights and one scale, as quantisers have them; it returns fp32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randint(-127, 128, (out_features, in_features)).to(torch.int8), False)
        self.register_buffer("scale", torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float() * self.scale)


class Opaque(Tensor):
    """A weight that is no plain tensor, as torchao and DTensor have them."""


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6)


def hooked() -> nn.Linear:
    made = linear()
    made.register_forward_hook(lambda module, args, output: 2 * output)
    return made


def patched() -> nn.Linear:
    """As accelerate does it: bound to the layer, so that a copy's forward is the copy's."""
    made = linear()
    made.old_forward = made.forward
    made.forward = partial(lambda module, x: module.old_forward(x) + 1, made)
    return made


def opaque() -> nn.Linear:
    made = linear()
    made.weight = nn.Parameter(made.weight.detach().as_subclass(Opaque))
    return made


BASES = {
    "hook": hooked,
    "own forward": patched,
    "parametrization": lambda: parametrizations.weight_norm(linear()),
    "subclass": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6),
    "tensor subclass": opaque,
    "custom": lambda: Scaled(8, 6).eval(),
    "quantised": lambda: Quantised(8, 6),
}
