"""Adapters become part of the weights of a plain transformers checkpoint, without a second copy of the model.

The weights are updated in place for as long as transformers writes them. What they were is on the disk meanwhile, and
is put back bit for bit.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrlora_ops._checkpoint import write_tensors
from lrlora_ops.adapters import Adapters
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._linear import LinearAdapter
from lrlora_ops.modules._merge import check_merge, check_merged_experts


def write(adapters: Adapters, directory: Path) -> None:
    """Write a checkpoint for ``from_pretrained``, in shards as transformers makes them.

    Raises:
        ValueError: The model is not one of transformers, or a weight cannot take its update.
    """
    plain: Any = adapters.unadapted()
    if not hasattr(plain, "save_pretrained"):
        raise ValueError(
            f"a {type(plain).__name__} has no save_pretrained, so there is no such checkpoint of it; "
            "call Adapters.merge and save the model's state dict"
        )
    with tempfile.TemporaryDirectory(dir=directory) as stash, _updated(adapters, Path(stash)):
        plain.save_pretrained(directory)


def check(adapters: Adapters, directory: Path) -> float:
    """Load the checkpoint, a layer at a time from the disk, and compare it layer by layer on random inputs.

    Returns:
        The largest difference, relative to the norm of the layer's output.

    Raises:
        ImportError: accelerate is not installed.
        RuntimeError: A layer differs by more than rounding.
    """
    model: Any = adapters.model
    with tempfile.TemporaryDirectory(dir=directory.parent) as offloaded:
        read = type(model).from_pretrained(
            directory, dtype=model.dtype, device_map={"": "disk"}, offload_folder=offloaded
        )
        return max(
            _difference(module, model.get_submodule(n), read.get_submodule(n)) for n, module in adapters.modules.items()
        )


def _difference(module: RankAdapter, host: Any, layer: Any) -> float:
    if isinstance(module, LinearAdapter):
        return check_merge(module, layer, module.plain_weight(), module.delta_weight(torch.float64))
    return check_merged_experts(host, layer)


def _weights(name: str, module: RankAdapter, host: Any) -> dict[str, Tensor]:
    """The weights that an adapter updates, by projection."""
    if isinstance(module, LinearAdapter):
        try:
            return {"": module.plain_weight()}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {projection: getattr(host, projection) for projection in module.pools()}


@contextmanager
def _updated(adapters: Adapters, stash: Path) -> Iterator[None]:
    """The weights have their updates; afterwards they are what they were."""
    hosts = {name: adapters.model.get_submodule(name) for name in adapters.modules}
    weights = {name: _weights(name, module, hosts[name]) for name, module in adapters.modules.items()}
    uses = Counter(id(p) for owner in adapters.model.modules() for p in owner._parameters.values() if p is not None)
    for name, own in weights.items():
        if any(uses[id(weight)] > 1 for weight in own.values()):
            raise ValueError(f"{name} shares its weight with another layer; call Adapters.merge and save the model")
    stored: list[str] = []
    try:
        for name, module in adapters.modules.items():
            write_tensors({key or "weight": t.detach().contiguous() for key, t in weights[name].items()}, stash / name)
            stored.append(name)
            for projection, weight in weights[name].items():
                module.add_update(projection, weight.detach(), getattr(hosts[name], "is_transposed", False))
        yield
    finally:
        for name in stored:
            for key, original in load_file(stash / name).items():
                weights[name]["" if key == "weight" else key].detach().copy_(original)
