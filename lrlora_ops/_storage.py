"""Bytes that tensors hold, each storage once, and that autograd keeps from a forward pass for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(
    forward: Callable[[], object], resident: Iterable[Tensor], leave_out: Callable[[Tensor], bool] = lambda _: False
) -> int:
    """Bytes that autograd keeps from the forward pass to the backward pass, each storage once.

    Args:
        forward: Runs the forward pass with gradients enabled.
        resident: Tensors that do not count, parameters and the like. An activation, x say, counts.
        leave_out: Says of a saved tensor that it does not count either.
    """
    known = {storage_of(tensor) for tensor in resident}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not leave_out(tensor):
            storages[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # only now may a saved tensor's memory be used again
    return sum(size for storage, size in storages.items() if storage not in known)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def storage_of(tensor: Tensor) -> int:
    """What tensors that share their memory have in common; on the meta device there are no addresses."""
    return tensor.untyped_storage()._cdata
