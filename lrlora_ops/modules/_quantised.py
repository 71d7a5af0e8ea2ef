"""Weights of quantised layers: read in fp32, and quantised again in their own way.

The layers are known by their weight: bitsandbytes' ``Params4bit`` and ``Int8Params``, and the tensor subclasses of
torchao that make themselves from a plain tensor. Neither library is imported unless such a weight is there.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.modules._merge import check_merge

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ELSEWHERE = (
    "export(format='peft') keeps the adapters beside the base; or save them, load them into the unquantised model with "
    "load_adapter, and merge or export there"
)


def is_quantised(layer: nn.Module) -> bool:
    """Whether ``dequantised`` and ``requantised`` know how the layer's weight is stored."""
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return weight.quant_state is not None
    if type(weight).__name__ == "Int8Params":
        return weight.dtype == torch.int8
    known = type(weight).__module__.startswith("torchao.") and hasattr(weight, "from_hp")
    return known and not has_no_derivative(layer)


def has_no_derivative(layer: nn.Module) -> bool:
    """Whether the layer's product is for inference alone, as in torchao's int4 layout for CPUs, which is opaque too."""
    return type(getattr(layer, "weight", None)).__name__ == "Int4OpaqueTensor"


def keep_differentiable(model: nn.Module) -> None:
    """Hold the 4-bit weights of bitsandbytes in the layout that they have on every machine.

    On a CPU with AVX512-BF16 a layer's first forward in eval mode packs its weight for inference: it can no longer be
    read, and from then on its product gives x no gradient. What is packed already is unpacked, by bitsandbytes itself.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = getattr(layer, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            weight.data, weight.quant_state = unpacked(weight.data, weight.quant_state)


@torch.no_grad()
def merge_quantised(adapter: Any, layer: nn.Module) -> nn.Module:
    """A copy of the layer with the update in its weight, quantised again, checked against the adapter's forward.

    Args:
        adapter: A ``VariableRankLoRALinear``.
        layer: Its base layer, ``is_quantised``.

    Raises:
        RuntimeError: The outputs differ by more than the rounding of the dtype that the layer computes in.
    """
    update = adapter.delta_weight()
    if not update.any():
        return copy.deepcopy(layer)  # to quantise again would change it
    merged = requantised(layer, dequantised(layer) + update)
    probe_like = update.to(compute_dtype(layer))
    hint = f"The layer's {type(layer.weight).__name__} is too coarse to hold it: {ELSEWHERE}"
    check_merge(adapter, merged, probe_like, adapter.delta_weight(torch.float64), hint)
    return merged


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """What the layer multiplies in, as far as it says so; else fp32."""
    said = (getattr(layer, "compute_dtype", None), *(getattr(t, "dtype", None) for t in _tensors(layer)))
    return next((dtype for dtype in said if dtype in FLOATING), torch.float32)


def dequantised(layer: Any) -> Tensor:
    """fp32 ``[N, K]``: what the quantised weight stands for."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        import bitsandbytes

        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves them
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales).float()
    return weight.dequantize().float()


def requantised(layer: nn.Module, updated: Tensor) -> nn.Module:
    """A copy of a quantised layer whose weight is ``updated``, quantised as the layer's is.

    Args:
        layer: ``is_quantised``.
        updated: ``[N, K]``.
    """
    made: Any = copy.deepcopy(layer)
    weight = made.weight
    settings = {"requires_grad": False}
    if type(weight).__name__ == "Params4bit":
        settings |= {n: getattr(weight, n) for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        fresh = type(weight)(updated.to(weight.quant_state.dtype), module=made, **settings).to(weight.device)
    elif type(weight).__name__ == "Int8Params":
        # It quantises what moves to its device from the CPU.
        fresh = type(weight)(updated.cpu(), **settings).to(weight.device)
    else:
        fresh = nn.Parameter(_torchao(weight, updated.to(weight.dtype)), requires_grad=False)
    made.weight = fresh
    return made


def _torchao(weight: Any, updated: Tensor) -> Tensor:
    """With the block size, bounds and so on of ``weight``: all that ``from_hp`` takes of what its tensors remember."""
    from torchao.quantization import MappingType, PerGroup, PerRow, PerTensor

    names = {*weight.tensor_attribute_names, *getattr(weight, "optional_tensor_attribute_names", ())}
    block, zero_point = tuple(weight.block_size), getattr(weight, "zero_point", None)
    rows, columns = updated.shape
    settings = {name: getattr(weight, name) for name in names} | {
        "granularity": {(rows, columns): PerTensor(), (1, columns): PerRow()}.get(block, PerGroup(block[-1])),
        "float8_dtype": weight.qdata.dtype,
        "mapping_type": MappingType.ASYMMETRIC
        if zero_point is not None and zero_point.any()
        else MappingType.SYMMETRIC,
    }
    accepted = inspect.signature(type(weight).from_hp).parameters
    return type(weight).from_hp(updated, **{name: value for name, value in settings.items() if name in accepted})


def _tensors(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(layer, "weight", None), getattr(layer, "bias", None)
