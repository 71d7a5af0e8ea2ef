"""Linear layers as bitsandbytes and torchao quantise them, and what their weights stand for, by these libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOUR_BIT = ["nf4", "nf4 twice", "fp4", "nf4 bf16"]
BITSANDBYTES = [*FOUR_BIT, "8 bit"]
TORCHAO = ["int8", "int8 bf16", "int8 groups", "int8 tensor", "int4", "int4 bf16", "fp8", "fp8 bf16"]
ALL = BITSANDBYTES + TORCHAO


def linear(in_features: int = 64, out_features: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias)


def quantised(name: str, layer: nn.Linear) -> nn.Module:
    """A quantised copy of the layer; skips the test where its library is not installed."""
    return _bitsandbytes(name, layer) if name in BITSANDBYTES else _torchao(name, layer)


def dtype_of(name: str) -> torch.dtype:
    """What the layer computes in."""
    return torch.bfloat16 if name.endswith("bf16") else torch.float32


def meaning(layer: Any) -> Tensor:
    """fp64 ``[N, K]``: the weight that a quantised layer multiplies with."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if hasattr(weight, "SCB"):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.dequantize().double()


def _bitsandbytes(name: str, layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if name == "8 bit":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        kind, twice = name.split()[0], name.endswith("twice")
        made = bnb.nn.Linear4bit(*sizes, quant_type=kind, compress_statistics=twice, compute_dtype=dtype_of(name))
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # this quantises


def _torchao(name: str, layer: nn.Linear) -> nn.Module:
    tq = pytest.importorskip("torchao.quantization")
    configs: dict[str, Callable[[], Any]] = {
        "int8": tq.Int8WeightOnlyConfig,
        "int8 groups": lambda: tq.Int8WeightOnlyConfig(granularity=tq.PerGroup(32)),
        "int8 tensor": lambda: tq.Int8WeightOnlyConfig(granularity=tq.PerTensor()),
        "int8 activations": tq.Int8DynamicActivationInt8WeightConfig,
        # Int4WeightOnlyConfig has no layout for a CPU; this one is for inference alone.
        "int4 opaque": lambda: pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(
            group_size=32, set_inductor_config=False
        ),
        "int4": lambda: tq.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=tq.PerGroup(32)),
        "fp8": tq.Float8WeightOnlyConfig,
    }
    holder = nn.Sequential(layer).to(dtype_of(name))
    tq.quantize_(holder, configs[name.removesuffix(" bf16")]())
    return holder[0]
