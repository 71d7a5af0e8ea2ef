"""Where every launch of a Triton kernel passes through, compiled or interpreted."""

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

KERNEL_CLASSES = (JITFunction, InterpretedFunction)
