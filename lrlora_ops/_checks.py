"""What the public ops accept, checked once, with messages that say what was given and what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrlora_ops._sharding import is_sharded
from lrlora_ops.rank_table import RankTable

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
    _check_gate(gate, lora_A.shape[0])
    _check_one_base(weight, bias, base)
    check_base(x, lora_B.shape[1], weight, bias, base)
    on_device = rank if isinstance(rank, Tensor) else None
    check_devices(x, lora_A=lora_A, lora_B=lora_B, gate=gate, rank=on_device, weight=weight, bias=bias, base=base)


def check_sinc(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    coefficients: Tensor,
    grid: float,
    bias: Tensor | None,
) -> None:
    """Raises ValueError for arguments that ``sinc_lora_linear`` cannot serve."""
    _check_pool(x, lora_A, lora_B)
    _check_frozen("weight", weight, (lora_B.shape[1], x.shape[-1]), x, has_base=False)
    if bias is not None:
        _check_frozen("bias", bias, (lora_B.shape[1],), x, has_base=False)
    _check_phi(coefficients, grid)
    check_devices(x, weight=weight, lora_A=lora_A, lora_B=lora_B, coefficients=coefficients, bias=bias)


def check_sinc_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    coefficients: Tensor,
    grid: float,
    bias: Tensor | None,
    transposed: bool,
) -> None:
    """One projection of all experts for ``moe_sinc_mlp``: weight [E, N, K] or [E, K, N], bias [E, N]."""
    _check_pool(x, lora_A, lora_B)
    num_experts = weight.shape[0]
    if lora_A.shape[0] % num_experts:
        raise ValueError(
            f"lora_A has {lora_A.shape[0]} rows for {num_experts} experts; it must have as many for each of them"
        )
    features = (lora_A.shape[1], lora_B.shape[1]) if transposed else (lora_B.shape[1], lora_A.shape[1])
    _check_frozen("weight", weight, (num_experts, *features), x, has_base=False)
    if bias is not None:
        _check_frozen("bias", bias, (num_experts, lora_B.shape[1]), x, has_base=False)
    _check_phi(coefficients, grid)
    check_devices(x, weight=weight, lora_A=lora_A, lora_B=lora_B, coefficients=coefficients, bias=bias)


def _check_phi(coefficients: Tensor, grid: float) -> None:
    if coefficients.dim() != 1 or coefficients.shape[0] % 2 == 0:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; it must be [2n + 1], one for each k from -n to n"
        )
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"coefficients is {coefficients.dtype}; it must be torch.float32 or torch.float64")
    if not 0 < grid < float("inf"):
        raise ValueError(f"grid is {grid}; it must be a finite number above 0, the distance between two sinc functions")


def check_grouped(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    group_offsets: Tensor,
    table: RankTable,
    gate: Tensor | None,
    ranks: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    transposed: bool,
) -> None:
    """Raises ValueError for arguments that ``grouped_lora_linear`` cannot serve."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [rows sorted by expert, in_features]")
    _check_offsets(group_offsets, table.num_experts, x.shape[0])
    check_expert_adapter(x, lora_A, lora_B, table, gate, ranks, weight, bias, transposed)
    _check_one_base(weight, bias, base)
    check_base(x, lora_B.shape[1], None, None, base)
    check_devices(x, group_offsets=group_offsets, base=base)


def check_expert_adapter(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    table: RankTable,
    gate: Tensor | None,
    ranks: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
) -> None:
    """One projection of all experts: its pool, its table, and weight [E, N, K] or [E, K, N], bias [E, N]."""
    _check_pool(x, lora_A, lora_B)
    if lora_A.shape[0] != table.pool_size:
        raise ValueError(
            f"lora_A has {lora_A.shape[0]} rows, but the table hands out {table.pool_size}; make them equal"
        )
    _check_gate(gate, table.pool_size)
    if ranks.dtype != torch.int32 or tuple(ranks.shape) != (table.num_experts,):
        shape = tuple(ranks.shape)
        raise ValueError(f"ranks is {ranks.dtype} of shape {shape}; it must be int32 [{table.num_experts}]")
    features = (lora_A.shape[1], lora_B.shape[1]) if transposed else (lora_B.shape[1], lora_A.shape[1])
    for name, tensor, shape in (("weight", weight, features), ("bias", bias, (lora_B.shape[1],))):
        if tensor is not None:
            _check_frozen(name, tensor, (table.num_experts, *shape), x)
    check_devices(x, lora_A=lora_A, lora_B=lora_B, table=table.ranks, ranks=ranks, gate=gate, weight=weight, bias=bias)


def _check_offsets(group_offsets: Tensor, num_experts: int, num_rows: int) -> None:
    if group_offsets.dtype != torch.int32 or tuple(group_offsets.shape) != (num_experts + 1,):
        raise ValueError(
            f"group_offsets is {group_offsets.dtype} of shape {tuple(group_offsets.shape)}; it must be int32 "
            f"[{num_experts + 1}], with a leading 0: see Routing.from_topk"
        )
    if not group_offsets.is_cpu or type(group_offsets) is not Tensor or torch.compiler.is_compiling():
        return  # reading it would wait for the device, or break the graph
    offsets = group_offsets.tolist()
    if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > num_rows:
        raise ValueError(
            f"group_offsets is {offsets}; it must start with 0, never decrease, and end within the {num_rows} rows of x"
        )


def _check_gate(gate: Tensor | None, pool_size: int) -> None:
    if gate is not None:
        _check_shape("gate", gate, (pool_size,))
        if gate.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gate is {gate.dtype}; it must be torch.float32 or torch.float64: use gate.float()")


def _check_one_base(weight: Tensor | None, bias: Tensor | None, base: Tensor | None) -> None:
    if weight is not None and base is not None:
        raise ValueError("both weight and base are given; give weight to compute the base product here, or base")
    if bias is not None and weight is None:
        raise ValueError("bias is given without weight; add it to base instead")


def _check_frozen(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, has_base: bool = True) -> None:
    _check_shape(name, tensor, shape)
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}; cast one, or run under torch.autocast")
    if tensor.requires_grad:
        otherwise = ", or compute the base product yourself and pass it as base" if has_base else ""
        raise ValueError(
            f"{name} requires a gradient, which this op does not compute; freeze it with "
            f"{name}.requires_grad_(False){otherwise}"
        )


def check_base(x: Tensor, out_features: int, weight: Tensor | None, bias: Tensor | None, base: Tensor | None) -> None:
    """The frozen part: weight [N, K], bias [N], or base [..., N]."""
    for name, tensor, shape in (("weight", weight, (out_features, x.shape[-1])), ("bias", bias, (out_features,))):
        if tensor is not None:
            _check_frozen(name, tensor, shape, x)
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
    """Everything lies where x lies, and all of it."""
    for name, tensor in (("x", x), *tensors.items()):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them with .to()")
        if type(tensor) not in (Tensor, nn.Parameter) and is_sharded(tensor):
            raise ValueError(
                f"{name} is divided among processes, a {type(tensor).__name__}, but the op needs all of it: divide "
                "the model by fully_shard, which gathers what a layer needs, and not by experts or outputs"
            )


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
