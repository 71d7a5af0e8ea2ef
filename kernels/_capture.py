"""Runs a launcher for a GPU that is not there: every kernel is compiled as a launch would, and none is started.

The launcher itself decides arguments, constants and grid, and Triton specialises them as it does on the GPU, so what is
compiled here cannot drift from the code, and what is on its way to a GPU that is there is found in Triton's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import CompilationError, OutOfResources
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lrlora_ops.kernels import _configs

# What a launch raises with a tile that the GPU cannot run.
LAUNCH_ERRORS = (RuntimeError, OutOfResources, CompilationError)


@dataclass(frozen=True)
class Launch:
    """One launch that did not happen. ``arguments`` are all of the kernel's, by name, constants included."""

    kernel: str
    compiled: Any  # triton.compiler.CompiledKernel
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


class _AbsentGPU:
    """What ``JITFunction.run`` asks a Triton driver before it compiles; the device's number is its target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> None:
        return None


def this_gpu(device: int) -> tuple[GPUTarget, int]:
    """What kernels are compiled for on a device of this machine, and the bytes of shared memory a program may have."""
    shared = driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return driver.active.get_current_target(), shared


def capture(target: GPUTarget, launcher: Callable[[], object]) -> list[Launch]:
    """The launches that ``launcher()`` makes on ``target``, in order; not for a process that also uses a GPU."""
    launches = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = {name: named.pop(name) for name in kernel.arg_names}
        launches.append(Launch(kernel.__name__, compiled, arguments, named, grid))
        return compiled

    driver.set_active(_AbsentGPU(target))  # for good: without a GPU there is none to go back to
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_configs, "backend", lambda: target.backend),
        mock.patch.object(_configs, "device_name", lambda: ""),  # the tiles of a GPU that is there are not asked for
    ):
        launcher()
    return launches
