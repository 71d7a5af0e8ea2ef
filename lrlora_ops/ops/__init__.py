"""Public ops: ``torch.autograd.Function`` over the primitives of a backend."""

from lrlora_ops.ops.grouped_lora_linear import grouped_lora_linear
from lrlora_ops.ops.lora_linear import lora_linear
from lrlora_ops.ops.moe_lora_mlp import ExpertLinear, moe_lora_mlp
from lrlora_ops.ops.moe_sinc_mlp import SincExpertLinear, moe_sinc_mlp
from lrlora_ops.ops.sinc_lora_linear import sinc_lora_linear

__all__ = [
    "ExpertLinear",
    "SincExpertLinear",
    "grouped_lora_linear",
    "lora_linear",
    "moe_lora_mlp",
    "moe_sinc_mlp",
    "sinc_lora_linear",
]
