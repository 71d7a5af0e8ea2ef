"""lrlora_ops: kernels and modules for LoRA whose rank is not one number."""

from lrlora_ops.adapters import Adapters
from lrlora_ops.apply import apply_lora, load_adapter
from lrlora_ops.methods import DynamicRank, FixedRank, LearnedRank, SincUpdate
from lrlora_ops.modules import (
    SincLoRAExperts,
    SincLoRALinear,
    VariableRankLoRAExperts,
    VariableRankLoRAGroupedLinear,
    VariableRankLoRALinear,
)
from lrlora_ops.ops import (
    ExpertLinear,
    SincExpertLinear,
    grouped_lora_linear,
    lora_linear,
    moe_lora_mlp,
    moe_sinc_mlp,
    sinc_lora_linear,
)
from lrlora_ops.rank_table import RankTable
from lrlora_ops.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "DynamicRank",
    "ExpertLinear",
    "FixedRank",
    "LearnedRank",
    "RankTable",
    "Routing",
    "SincExpertLinear",
    "SincLoRAExperts",
    "SincLoRALinear",
    "SincUpdate",
    "VariableRankLoRAExperts",
    "VariableRankLoRAGroupedLinear",
    "VariableRankLoRALinear",
    "apply_lora",
    "grouped_lora_linear",
    "load_adapter",
    "lora_linear",
    "moe_lora_mlp",
    "moe_sinc_mlp",
    "sinc_lora_linear",
]
