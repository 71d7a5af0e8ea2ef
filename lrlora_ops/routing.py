"""Which rows go to which expert: top-k choices sorted by expert, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The (token, choice) pairs of a batch, sorted by expert; the order within an expert is stable.

    Attributes:
        token_index: int64 ``[L]``, the token of each sorted row; L = tokens * top_k.
        row_order: int64 ``[L]``, the position of each sorted row in the flattened ``top_k_index``.
        row_position: int64 ``[T, k]``, the inverse: the sorted row of each pair.
        group_offsets: int32 ``[E + 1]``: expert e has the sorted rows ``group_offsets[e]`` to
            ``group_offsets[e + 1]``. Dropped pairs come after ``group_offsets[E]``.
    """

    token_index: Tensor
    row_order: Tensor
    row_position: Tensor
    group_offsets: Tensor

    @classmethod
    def from_topk(cls, top_k_index: Tensor, num_experts: int, backend: str | None = None) -> Routing:
        """Sort the choices of a router, without a host sync.

        Args:
            top_k_index: int32 or int64 ``[T, k]``, the experts of each token; ``num_experts`` drops a pair.
            num_experts: E.
            backend: "triton", which drops any index outside ``0..E - 1``; "eager"; or None for triton on a GPU and
                eager elsewhere.

        Raises:
            ValueError: ``top_k_index`` is not such a matrix or, in eager on a CPU, holds an index outside ``0..E``;
                or the backend cannot run there.
        """
        if top_k_index.dim() != 2 or top_k_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"top_k_index is {top_k_index.dtype} of shape {tuple(top_k_index.shape)}; it must be int32 or int64 "
                "[tokens, top_k]"
            )
        if backend == "triton" or (backend is None and top_k_index.is_cuda):
            from lrlora_ops.ops._backends import primitives, resolve_backend  # on use: the ops are above this module

            route = primitives(resolve_backend("triton", top_k_index.device), top_k_index).route
            return cls(*route(top_k_index, num_experts))
        if top_k_index.is_cpu and top_k_index.numel() and not torch.compiler.is_compiling():
            low, high = top_k_index.aminmax()
            if low < 0 or high > num_experts:
                raise ValueError(
                    f"top_k_index holds {int(low)}..{int(high)}; it must be from 0 to {num_experts}, where "
                    f"{num_experts} itself drops the pair"
                )
        experts, row_order = top_k_index.flatten().sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, bounds, out_int32=True)
        rows = torch.arange(experts.numel(), device=experts.device)
        position = torch.empty_like(row_order).scatter_(0, row_order, rows)
        return cls(row_order // max(top_k_index.shape[1], 1), row_order, position.view_as(top_k_index), offsets)
