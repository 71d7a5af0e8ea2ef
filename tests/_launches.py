"""What a GPU would be asked to do: every kernel launch that a piece of code makes, and every wait for the device.

PyTorch's operations are counted as one launch each (some are several), views and allocations as none, and each launch
of a Triton kernel as one. It needs no GPU: the kernels run interpreted, on CPU tensors. The launches can be made again,
as those of a captured CUDA graph are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from benchmarks.static_report.launches import KERNEL_CLASSES

# They allocate, or look at a tensor from another angle.
_FREE = "empty empty_like empty_strided new_empty new_empty_strided detach _unsafe_view"
# Of values that lie on the device: each makes the host wait until they are there, so it cannot be captured in a graph.
_WAITS = "_local_scalar_dense item nonzero equal is_nonzero masked_select bincount repeat_interleave"
_WAITS += " _unique _unique2 unique_consecutive unique_dim"

# Methods that wait as well, and are no operation on a CPU.
_READS = ("tolist", "numpy", "cpu", "__array__")


class HostSyncError(AssertionError):
    """The host would have waited for the device."""


class Launches(list[str]):
    """The names of launches, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._again: list[Callable[[], object]] = []

    def add(self, name: str, again: Callable[[], object]) -> None:
        self.append(name)
        self._again.append(again)

    @torch.no_grad()
    def replay(self) -> None:
        """Launch them again: the same numbers, and tensors at the same addresses with what they hold by now.

        As in the replay of a graph, no line of the code that was captured runs.
        """
        for again in self._again:
            again()


class _Operations(TorchDispatchMode):
    """Adds each operation that launches a kernel; refuses those that wait."""

    def __init__(self, launched: Launches) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITS.split() or (name == "index" and any(_is_mask(index) for index in args[1])):
            raise HostSyncError(f"aten::{name} waits for the device")
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in _FREE.split() and any(t.numel() for t in _tensors(out)):
            self.launched.add(f"aten::{name}", lambda: _copy(func(*args, **(kwargs or {})), out))
        return out


def _copy(results: Any, out: Any) -> None:
    for result, tensor in zip(_tensors(results), _tensors(out), strict=True):
        tensor.copy_(result)


def _refused(name: str) -> Any:
    """A method of tensors that is not allowed, but to the interpreter within a launch."""
    read = getattr(torch.Tensor, name)

    def refused(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(_get_current_dispatch_mode(), _Operations):
            raise HostSyncError(f"Tensor.{name} waits for the device")
        return read(tensor, *args, **kwargs)

    return mock.patch.object(torch.Tensor, name, refused)


def _is_mask(index: Any) -> bool:
    return torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)]


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """The launches within.

    Raises:
        HostSyncError: Something within waits for the device.
    """
    launched = Launches()

    def counting(run: Any) -> Any:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            launched.add(kernel.__name__, lambda: run(kernel, *args, **kwargs))
            with _disable_current_modes():  # how the interpreter moves tensors is not the launch's doing
                return run(kernel, *args, **kwargs)

        return counted

    patches = [mock.patch.object(kind, "run", counting(kind.run)) for kind in KERNEL_CLASSES]
    patches += [_refused(name) for name in _READS]
    for patch in patches:
        patch.start()
    try:
        with _Operations(launched):
            yield launched
    finally:
        for patch in patches:
            patch.stop()


def captured(step: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """The step as a CUDA graph, and what each replay writes anew.

    Raises:
        RuntimeError: The step waits for the GPU, or cannot be captured.
    """
    stream = torch.cuda.Stream()  # capture wants a warm-up on another stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
