"""Adapters: modules that hold parameters and a rank table."""

from lrlora_ops.modules.experts import VariableRankLoRAExperts
from lrlora_ops.modules.grouped import VariableRankLoRAGroupedLinear
from lrlora_ops.modules.linear import VariableRankLoRALinear
from lrlora_ops.modules.sinc import SincLoRALinear
from lrlora_ops.modules.sinc_experts import SincLoRAExperts

__all__ = [
    "SincLoRAExperts",
    "SincLoRALinear",
    "VariableRankLoRAExperts",
    "VariableRankLoRAGroupedLinear",
    "VariableRankLoRALinear",
]
