"""The layers of a model by their names in its checkpoint, as transformers writes it: what a server has loaded."""

from __future__ import annotations

import re

from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from lrlora_ops.modules._interface import expert_features, expert_projections, is_experts

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every matrix in the checkpoint, experts included where it has them one by one."""
    weights = revert_weight_conversion(model, model.state_dict())
    return {
        k.removesuffix(".weight"): tuple(t.shape) for k, t in weights.items() if t.dim() == 2 and k.endswith(".weight")
    }


def expert_sizes(model: nn.Module) -> dict[int, tuple[int, dict[str, tuple[int, int]]]]:
    """By decoder layer: the number of experts, and outputs and inputs of each projection."""
    found = {}
    for name, module in model.named_modules():
        if is_experts(module):
            first, second = expert_projections(module)
            (inputs, outputs), (down_in, down_out) = (expert_features(module, p) for p in (first, second))
            half = outputs // 2 if module.has_gate else outputs
            sizes = {
                "up": (half, inputs),
                "gate": (half, inputs),
                "gate_up": (outputs, inputs),
                "down": (down_out, down_in),
            }
            found[int(re.search(r"layers\.(\d+)\.", name)[1])] = (module.down_proj.shape[0], sizes)
    return found
