"""What a step needs beside the tensors that exist anyway: saved for backward, and at its peak."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from the forward pass to the backward pass, each storage once.

    Args:
        forward: Runs the forward pass with gradients enabled.
        resident: Tensors that do not count, parameters and the like. An activation, x say, counts.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # only now may a saved tensor's memory be used again
    return sum(size for pointer, size in storages.items() if pointer not in known)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator holds during the step beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = step()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))
