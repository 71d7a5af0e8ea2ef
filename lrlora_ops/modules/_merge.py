"""The proof of a merge: the plain layer computes what the adapted one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lrlora_ops.modules._interface import plain_forward
from lrlora_ops.ops._autocast import without_autocast

_WRONG = "Is there a NaN in it, or does the base layer transform its weight?"


@torch.no_grad()
def check_merge(adapter: nn.Module, merged: nn.Module, weight: Tensor, update: Tensor, hint: str = _WRONG) -> float:
    """Compare both layers in evaluation mode on random rows, and leave their modes as they are.

    Args:
        adapter: The adapted layer, ``[..., K] -> [..., N]``.
        merged: The layer that shall replace it.
        weight: ``[N, K]``, the base layer's; its dtype is what the layers compute in.
        update: fp64 ``[N, K]``, what was added to it.
        hint: The end of the error.

    Returns:
        The norm of the difference, relative to that of the output.

    Raises:
        RuntimeError: The outputs differ by more than the rounding of the merged weight and of both terms of the sum.
    """
    probe = torch.randn(16, weight.shape[1], device=weight.device, dtype=weight.dtype)
    with _evaluating(adapter, merged), without_autocast(weight.device):
        actual, expected = merged(probe).double(), adapter(probe).double()
    return _compare(actual, expected, weight, (probe.double() @ update.t()).norm(), hint)


@torch.no_grad()
def check_merged_experts(experts: Any, merged: Any, inner: Any = None) -> float:
    """Compare adapted and merged experts on random tokens that all experts get, as ``check_merge`` does.

    Args:
        experts: The adapted experts module of transformers.
        merged: The one that shall replace it.
        inner: The plain experts module within it, if that is wrapped.

    Raises:
        RuntimeError: The outputs differ by more than rounding.
        ValueError: The weights are no parameters that could hold an update.
    """
    if is_parametrized(experts):
        raise ValueError(
            "the experts' weights are computed from others (a parametrization, as bitsandbytes quantises experts): "
            "save the adapters, load them into the unquantised model with load_adapter, and merge or export there"
        )
    weight = experts.down_proj
    num_experts, hidden = weight.shape[0], weight.shape[2 if experts.is_transposed else 1]
    tokens = torch.randn(2 * num_experts, hidden, device=weight.device, dtype=weight.dtype)
    index = torch.arange(num_experts, device=weight.device).repeat(2)[:, None]
    ones = torch.ones_like(index, dtype=weight.dtype)
    with _evaluating(experts, merged), without_autocast(weight.device):
        expected = experts(tokens, index, ones).double()
        with plain_forward(experts), plain_forward(merged if inner is None else inner):
            actual, base = (module(tokens, index, ones).double() for module in (merged, experts))
    return _compare(actual, expected, weight, (expected - base).norm(), _WRONG)


@contextmanager
def _evaluating(*roots: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _compare(actual: Tensor, expected: Tensor, weight: Tensor, update: Tensor, hint: str) -> float:
    difference = (actual - expected).norm()
    allowed = _rounding(weight) * (expected.norm() + update)
    if not difference <= allowed:
        raise RuntimeError(
            f"the merged layer differs from the adapter's forward by {difference:.3g} (allowed {allowed:.3g}, the "
            f"update is {update:.3g}); the adapter was not merged. {hint}"
        )
    return float(difference / expected.norm()) if difference else 0.0


def _rounding(weight: Tensor) -> float:
    """Relative error to expect of a product with the weight: sums are in fp32, whose terms may be rounded to less."""
    backend = torch.backends.cuda if weight.is_cuda else torch.backends.mkldnn
    dtype = weight.dtype
    if dtype == torch.float32:  # TF32 has as many bits of mantissa as fp16
        dtype = {"tf32": torch.float16, "bf16": torch.bfloat16}.get(backend.matmul.fp32_precision, dtype)
    return (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps
