"""What the public ops accept, checked once, with messages that say what was given and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_lora_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    rank: int | Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
) -> None:
    """Raises ValueError for arguments that ``lora_linear`` cannot serve."""
    _check_pool(x, lora_A, lora_B)
    _check_rank(rank, lora_A.shape[0])
    if gate is not None:
        _check_shape("gate", gate, (lora_A.shape[0],))
        if gate.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gate is {gate.dtype}; it must be torch.float32 or torch.float64: use gate.float()")
    if weight is not None and base is not None:
        raise ValueError("both weight and base are given; give weight to compute the base product here, or base")
    if bias is not None and weight is None:
        raise ValueError("bias is given without weight; add it to base instead")
    check_base(x, lora_B.shape[1], weight, bias, base)
    on_device = rank if isinstance(rank, Tensor) else None
    check_devices(x, lora_A=lora_A, lora_B=lora_B, gate=gate, rank=on_device, weight=weight, bias=bias, base=base)


def check_base(x: Tensor, out_features: int, weight: Tensor | None, bias: Tensor | None, base: Tensor | None) -> None:
    """The frozen part: weight [N, K], bias [N], or base [..., N]."""
    for name, tensor, shape in (("weight", weight, (out_features, x.shape[-1])), ("bias", bias, (out_features,))):
        if tensor is None:
            continue
        _check_shape(name, tensor, shape)
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}; cast one, or run under torch.autocast")
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which this op does not compute; freeze it with "
                f"{name}.requires_grad_(False), or compute the base product yourself and pass it as base"
            )
    if base is not None:
        _check_shape("base", base, (*x.shape[:-1], out_features))
        if base.dtype not in _DTYPES:
            raise ValueError(f"base is {base.dtype}; it must be one of {_DTYPES}")


def check_backend_dtypes(backend: str, **tensors: Tensor | None) -> None:
    """The Triton kernels accumulate in fp32, so fp64 would lose what it was chosen for."""
    for name, tensor in tensors.items():
        if backend == "triton" and tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is torch.float64, and backend 'triton' accumulates in fp32; use backend='eager' for fp64"
            )


def check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    """Everything lies where x lies."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them with .to()")


def _check_pool(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    for name, tensor in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be one of {_DTYPES}")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [pool rows, features]")
    if x.dim() == 0 or x.shape[-1] != lora_A.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and lora_A {tuple(lora_A.shape)}; their last dimensions must be equal. "
            "lora_A is [R, in_features], one row a component"
        )
    if lora_B.shape[0] != lora_A.shape[0]:
        raise ValueError(
            f"lora_A has {lora_A.shape[0]} rows and lora_B {lora_B.shape[0]}; both have one row per component. "
            "lora_B is [R, out_features]: the transpose of PEFT's lora_B.weight"
        )


def _check_rank(rank: int | Tensor | None, pool_size: int) -> None:
    if rank is None:
        return
    if isinstance(rank, Tensor):
        if rank.dtype != torch.int32 or rank.numel() != 1:
            raise ValueError(
                f"rank is a {rank.dtype} tensor of shape {tuple(rank.shape)}; it must hold one int32: "
                "torch.tensor(rank, dtype=torch.int32)"
            )
        if not rank.is_cpu or type(rank) is not Tensor or torch.compiler.is_compiling():
            return  # reading it would wait for the device, or break the graph
    elif not isinstance(rank, int):
        raise ValueError(f"rank is {rank!r}; it must be an integer, an int32 tensor of one element, or None")
    if not 0 <= int(rank) <= pool_size:
        raise ValueError(f"rank is {int(rank)}; it must be from 0 to {pool_size}, the rows of lora_A")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
