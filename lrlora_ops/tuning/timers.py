"""How the time of one step is taken: by the clock on a CPU, by replays of a CUDA graph or by the profiler on a GPU.

Events around calls from Python time the host where it is the slower one, and so do not occur here.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Step = Callable[[], object]
_WARM_UP = 3  # first calls compile, tune and allocate
_FLUSH_BYTES = 2**28  # several times the L2 of any GPU


class Timer(Protocol):
    """One step, ready to be timed.

    Attributes:
        kind: How: "clock", "graph" or "profiler".
    """

    kind: str

    def sample(self) -> float:
        """Seconds that one run of the step takes."""


class Called:
    """Runs the step and looks at the clock; for a CPU."""

    kind = "clock"

    def __init__(self, step: Step) -> None:
        self.step = step

    def sample(self) -> float:
        began = time.perf_counter()
        result = self.step()
        elapsed = time.perf_counter() - began
        del result  # the memory goes back when the clock has stopped, for all alike
        return elapsed


class Replayed:
    """Replays the step's CUDA graph: no host time, but for the gaps between its kernels.

    Each replay finds an L2 full of something else. What fills it also keeps the GPU busy until the host has queued the
    replay, so that the events lie around the graph alone.
    """

    kind = "graph"

    def __init__(self, step: Step, pool: Any) -> None:
        self.graph = capture(step, pool)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        flush_l2()
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


class Profiled:
    """Sums the time of all that the step runs on the GPU, as the profiler sees it, the gaps between kernels left out.

    For a step that waits for the GPU, which no graph can hold.
    """

    kind = "profiler"

    def __init__(self, step: Step) -> None:
        self.step = step

    def sample(self) -> float:
        flush_l2()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step()
            torch.cuda.synchronize()
        return device_microseconds(profile.key_averages()) / 1e6


def device_microseconds(events: object) -> float:
    """What a profile's averaged events took on the device, each once; annotations span others and do not count."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    total = sum(event.self_device_time_total for event in on_device if not event.is_user_annotation)
    if not total:
        raise RuntimeError("the profiler saw nothing run on the GPU")
    return total


def timer_for(step: Step, device: torch.device, pool: tuple[int, int] | None) -> Timer:
    """The timer that fits the step. On a GPU the step has run when this returns, and has shown whether it waits.

    Args:
        step: What is timed.
        device: Where it runs.
        pool: Of ``torch.cuda.graph_pool_handle()``: steps that share one share the memory of their graphs.
    """
    if device.type != "cuda":
        return Called(step)
    assert pool is not None
    for _ in range(_WARM_UP):
        step()
    torch.cuda.synchronize()
    return Profiled(step) if waits_for_gpu(step) else Replayed(step, pool)


def waits_for_gpu(step: Step) -> bool:
    """Whether the host waits for the GPU within the step. To capture such a step fails, and may harm the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def capture(step: Step, pool: Any) -> torch.cuda.CUDAGraph:
    """The step as a graph. Its results are dropped, so that graphs of one pool may be replayed in any order."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # unlike torch.cuda.graph, this leaves the stream where the capture fails
        step()  # workspaces of this stream are not of the graph
        stream.synchronize()
        graph.capture_begin(pool=pool)
        try:
            result = step()
        finally:
            graph.capture_end()
        del result
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return graph


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def flush_l2() -> None:
    """Fill the GPU's L2 with what no step reads."""
    _filler().zero_()


@cache
def _filler() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
