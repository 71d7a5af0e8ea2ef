"""``lrlora env``: what a report of a problem should say about the machine, without names of people and folders."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import lrlora_ops
from lrlora_ops.ops._backends import backend_reason

PACKAGES = (
    *("triton", "numpy", "safetensors", "transformers", "tokenizers", "accelerate", "peft", "trl"),
    *("bitsandbytes", "torchao", "typer", "rich", "matplotlib"),
)
# Variables that change what runs; no other is read. Their names say nothing of the user, their values may.
VARIABLES = (
    *(
        "TRITON_INTERPRET",
        "TRITON_CACHE_DIR",
        "LRLORA_CACHE_DIR",
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
    ),
    *("CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"),
    *("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
)


def environment() -> dict[str, str]:
    """What there is, by its name: versions, devices, backends, variables that are set."""
    return {
        "lrlora_ops": lrlora_ops.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,  # names the build, which an installed package's version may not
        **{name: found for name in PACKAGES if (found := _version(name))},
        **_devices(),
        **{f"backend on {device}": backend_reason(torch.device(device)) for device in _device_types()},
        **_tiles(),
        **{name: shown(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def as_text(facts: Mapping[str, str]) -> str:
    """A line for each, in two columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def shown(value: str) -> str:
    """A variable's value; of a path only that it is one, for it may tell who the user is."""
    return "(a path)" if "/" in value or "\\" in value or str(Path.home()) in value else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tiles() -> dict[str, str]:
    """Whose tiles the kernels take."""
    if not find_spec("triton"):
        return {}
    from lrlora_ops.kernels._configs import tables_in_use

    return {"tiles": tables_in_use()}


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices() -> dict[str, str]:
    """The CPU and every GPU that PyTorch can use."""
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}"}
    found["CUDA, ROCm"] = f"{torch.version.cuda or 'no'}, {torch.version.hip or 'no'}"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"capability {facts.major}.{facts.minor}"
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {capability}"
    return found
