"""Public ops: ``torch.autograd.Function`` over the primitives of a backend."""

from lrlora_ops.ops.lora_linear import lora_linear

__all__ = ["lora_linear"]
