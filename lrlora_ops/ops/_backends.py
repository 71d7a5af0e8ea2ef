"""Which implementation of the primitives runs: asked for, or chosen by the device; never a silent fallback."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef

from lrlora_ops import eager

BACKENDS = ("triton", "eager", "reference")
_BY_DEVICE = {"cuda": "triton"}
_PRIMITIVES: dict[str, ModuleType] = {"eager": eager}
if importlib.util.find_spec("triton") is not None:
    from lrlora_ops.kernels import primitives as _triton  # type: ignore[attr-defined]

    _PRIMITIVES["triton"] = _triton
# Triton decides at import whether a kernel is compiled or interpreted.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The name of the backend for tensors on ``device``.

    Raises:
        ValueError: The backend is unknown, or cannot run on the device; the message says why and what can.
    """
    if backend is None:
        backend = _BY_DEVICE.get(device.type, "eager")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {BACKENDS}, or None to choose by device")
    if backend == "triton":
        _require_triton(device)
    return backend


def backend_reason(device: torch.device) -> str:
    """In words: the backend that is chosen on a device, why, and whether another can be asked for."""
    try:
        chosen = resolve_backend(None, device)
    except ValueError as error:
        return f"none: {error}"
    if chosen == "triton":
        return "triton, compiled for the GPU; eager can be asked for"
    if "triton" not in _PRIMITIVES:
        return "eager, PyTorch on this device; triton is not installed"
    if _INTERPRETED:
        return "eager, PyTorch on this device; triton can be asked for and is interpreted (TRITON_INTERPRET=1)"
    return "eager, PyTorch on this device; triton would need a GPU, or TRITON_INTERPRET=1"


def _require_triton(device: torch.device) -> None:
    if "triton" not in _PRIMITIVES:
        raise ValueError("backend 'triton' needs the triton package: pip install triton, or use backend='eager'")
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        raise ValueError(
            f"backend 'triton' cannot run on {device.type} tensors: Triton needs a CUDA or ROCm device, or its "
            "interpreter on the CPU (set TRITON_INTERPRET=1 before lrlora_ops is imported); use backend='eager'"
        )


def _without_dispatch(module: ModuleType) -> SimpleNamespace:
    """The functions inside a module's custom ops, whose dispatch takes longer than the products of a small layer."""
    ops = {name: op for name, op in vars(module).items() if isinstance(op, CustomOpDef)}
    return SimpleNamespace(**{name: _inside(op) for name, op in ops.items()})


def _inside(op: Any) -> Callable[..., Any]:
    return getattr(op, "_init_fn", op)


_FUNCTIONS = {backend: _without_dispatch(module) for backend, module in _PRIMITIVES.items()}


def primitives(backend: str, x: Tensor) -> Any:
    """The primitives of a backend for tensors like x: custom ops while they are traced, else the functions inside."""
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_meta
    return _PRIMITIVES[backend] if traced else _FUNCTIONS[backend]


@contextmanager
def recorded(backend: str) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The calls of a backend's primitives within, in order: names and arguments by name."""
    functions, calls = _FUNCTIONS[backend], []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, signature.bind(*args, **kwargs).arguments))
            return function(*args, **kwargs)

        return call

    _FUNCTIONS[backend] = SimpleNamespace(**{name: recording(name, f) for name, f in vars(functions).items()})
    try:
        yield calls
    finally:
        _FUNCTIONS[backend] = functions


def launcher(name: str) -> Callable[..., Any]:
    """What launches the Triton kernels of a primitive, tensors on the meta device and all."""
    return _inside(getattr(_PRIMITIVES["triton"], name))


def add_base_product(backend: str, y: Tensor, x: Tensor, weight: Tensor, transposed: bool = False) -> None:
    """``y += x W^T``, or ``x W`` if transposed, in place, for a frozen ``weight`` ``[N, K]``: the base layer's part.

    PyTorch's own product, which hides the read of y, but for half precision on a CPU without instructions for it,
    which PyTorch emulates.
    """
    if backend == "eager" and eager.widens(x):
        y.add_(primitives(backend, x).grouped_gemm(x, weight[None], None, transposed))
    else:
        y.addmm_(x, weight if transposed else weight.t())
