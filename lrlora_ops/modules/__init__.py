"""Adapters: modules that hold parameters and a rank table."""

from lrlora_ops.modules.linear import VariableRankLoRALinear

__all__ = ["VariableRankLoRALinear"]
