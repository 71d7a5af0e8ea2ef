"""How PEFT lays out LoRA's matrices in a checkpoint, and how they become rank components.

Linear layers: ``lora_A.weight`` ``[r, K]`` and ``lora_B.weight`` ``[N, r]``. Parameters of experts, ``[E, N, K]`` or
``[E, K, N]``: all experts in one pair of matrices, ``[E * r, K]`` with the expert slowest and ``[N, r * E]`` with the
expert fastest. Before PEFT 0.19.1 the two changed places for some layouts of the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def expert_matrices(a: Tensor, b: Tensor, swapped: bool) -> tuple[Tensor, Tensor]:
    """The weights of PEFT's lora_A and lora_B.

    Args:
        a: ``[E, r, K]``.
        b: ``[E, r, N]``.
        swapped: Whether they change places.
    """
    first, second = (b, a) if swapped else (a, b)
    return first.flatten(0, 1), second.permute(2, 1, 0).flatten(1)


def expert_components(lora_a: Tensor, lora_b: Tensor, num_experts: int, swapped: bool) -> tuple[Tensor, Tensor]:
    """The inverse of ``expert_matrices``: a ``[E, r, K]`` and b ``[E, r, N]``."""
    first = lora_a.view(num_experts, -1, lora_a.shape[1])
    second = lora_b.view(lora_b.shape[0], -1, num_experts).permute(2, 1, 0)
    return (second, first) if swapped else (first, second)


def is_swapped(width: int, in_features: int, out_features: int, transposed: bool, version: str | None) -> bool:
    """Whether lora_A of an expert parameter belongs to the outputs.

    Args:
        width: Columns of lora_A.
        in_features: K.
        out_features: N.
        transposed: Whether the parameter is ``[E, K, N]``.
        version: PEFT's, as the checkpoint's config names it; older ones name none.

    Raises:
        ValueError: The width is neither K nor N.
    """
    if width not in (in_features, out_features):
        raise ValueError(f"lora_A has {width} columns, and the parameter {in_features} inputs, {out_features} outputs")
    if in_features != out_features:
        return width == out_features
    release = tuple(int(number) for number in re.findall(r"\d+", version or "0")[:3])
    if release >= (0, 19, 1):
        return False
    return release >= (0, 19) or not transposed


def padded(components: list[Tensor], rank: int) -> Tensor:
    """``[E, rank, K]``: the components ``[r_e, K]`` of each expert, and zeros."""
    result = components[0].new_zeros(len(components), rank, components[0].shape[1])
    for expert, own in enumerate(components):
        result[expert, : len(own)] = own
    return result.contiguous()


def scaled(b: Tensor, scaling: float) -> Tensor:
    """b times a factor, in b's dtype; computed in fp32 or wider."""
    return (b.to(torch.promote_types(b.dtype, torch.float32)) * scaling).to(b.dtype)


def of_pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's look-up: the first key that matches the name, or its end from a dot on."""
    return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
