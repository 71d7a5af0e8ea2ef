"""The proof of a merge: the plain layer computes what the adapted one does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrlora_ops.ops._backward import without_autocast


def check_merge(adapter: nn.Module, merged: nn.Module, weight: Tensor, update: Tensor) -> None:
    """Compare both layers in evaluation mode on random rows, and leave their modes as they are.

    Args:
        adapter: The adapted layer, ``[..., K] -> [..., N]``.
        merged: The layer that shall replace it.
        weight: ``[N, K]``, the base layer's; its dtype is what the layers compute in.
        update: fp64 ``[N, K]``, what was added to it.

    Raises:
        RuntimeError: The outputs differ by more than the rounding of the merged weight and of both terms of the sum.
    """
    probe = torch.randn(16, weight.shape[1], device=weight.device, dtype=weight.dtype)
    modes = [(module, module.training) for root in (adapter, merged) for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with without_autocast(weight.device):
            actual, expected = merged(probe).double(), adapter(probe).double()
    finally:
        for module, mode in modes:
            module.training = mode
    difference = (actual - expected).norm()
    allowed = _rounding(weight) * (expected.norm() + (probe.double() @ update.t()).norm())
    if not difference <= allowed:
        raise RuntimeError(
            f"the merged layer differs from the adapter's forward by {difference:.3g} (allowed {allowed:.3g}); the "
            "adapter was not merged. Is there a NaN in it, or does the base layer transform its weight?"
        )


def _rounding(weight: Tensor) -> float:
    """Relative error to expect of a product with the weight: sums are in fp32, whose terms may be rounded to less."""
    backend = torch.backends.cuda if weight.is_cuda else torch.backends.mkldnn
    dtype = weight.dtype
    if dtype == torch.float32:  # TF32 has as many bits of mantissa as fp16
        dtype = {"tf32": torch.float16, "bf16": torch.bfloat16}.get(backend.matmul.fp32_precision, dtype)
    return (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps
