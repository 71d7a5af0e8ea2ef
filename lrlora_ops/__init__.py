"""lrlora_ops: kernels and modules for LoRA whose rank is not one number."""

from lrlora_ops.adapters import Adapters, apply_lora
from lrlora_ops.methods import FixedRank, LearnedRank
from lrlora_ops.modules import VariableRankLoRALinear
from lrlora_ops.ops import lora_linear
from lrlora_ops.rank_table import RankTable

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "FixedRank",
    "LearnedRank",
    "RankTable",
    "VariableRankLoRALinear",
    "apply_lora",
    "lora_linear",
]
