"""Adapters: modules that hold parameters and a rank table."""

from lrlora_ops.modules.experts import VariableRankLoRAExperts
from lrlora_ops.modules.grouped import VariableRankLoRAGroupedLinear
from lrlora_ops.modules.linear import VariableRankLoRALinear
from lrlora_ops.modules.sinc import SincLoRALinear

__all__ = ["SincLoRALinear", "VariableRankLoRAExperts", "VariableRankLoRAGroupedLinear", "VariableRankLoRALinear"]
