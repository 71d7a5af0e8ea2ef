"""An adapter checkpoint: ``lrlora_state.json`` and the safetensors file that it names.

The JSON is replaced last, in one rename, so a checkpoint is the old one or the new one at every moment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrlora_ops import methods
from lrlora_ops._sharding import divided, is_sharded, require_whole, whole
from lrlora_ops.methods import Method
from lrlora_ops.rank_table import RankTable

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters

STATE_FILE = "lrlora_state.json"
VERSION = 1
_SAME = "call apply_lora with the model, method and targets that were saved"


def state_of(adapters: Adapters) -> dict[str, Any]:
    """What a checkpoint holds; see ``Adapters.state_dict``."""
    if not adapters.modules:
        raise ValueError("the adapters are merged into the model, so there is nothing to save; save the model")
    tensors, policies = _policy_state(adapters)
    for name, module in adapters.modules.items():
        state = module.state_dict()
        tensors |= {f"{name}.{key}": state[key].detach() for key in _keys(module.settings())}
    return {
        "version": VERSION,
        "modules": {name: module.settings() for name, module in adapters.modules.items()},
        "methods": _describe(adapters),
        "policies": policies,
        "tensors": tensors,
    }


def restore(adapters: Adapters, state: Mapping[str, Any]) -> None:
    """Continue from ``state_of``; everything is checked before anything is written."""
    tensors = state["tensors"]
    try:
        _check(adapters, state, tensors)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint is damaged ({error!r}); load another one") from error
    resized = {name for name, module in adapters.modules.items() if state["modules"][name] != module.settings()}
    if resized:
        require_whole(adapters.parameters(), "a checkpoint of another capacity")
    for name, module in adapters.modules.items():
        settings = state["modules"][name]
        if name in resized:
            module.reallocate(settings["max_rank"], settings["pool_size"])
        here = module.state_dict()
        own = {key: divided(tensors[f"{name}.{key}"], here[key]) for key in _keys(settings)}
        module.load_state_dict(own, strict=False)
    for index, policy in enumerate(adapters.policies):
        policy.load_state_dict(_state_of_policy(index, state, tensors))


def save(adapters: Adapters, directory: str | os.PathLike[str]) -> None:
    """Write the checkpoint; see ``Adapters.save``."""
    state = state_of(adapters)
    sharded = any(is_sharded(tensor) for tensor in state["tensors"].values())
    tensors = {name: whole(t).to("cpu", copy=_is_shared(name)).contiguous() for name, t in state["tensors"].items()}
    try:
        if _is_first_process():
            _write(Path(directory), state, tensors)
    finally:
        if sharded:  # all processes are here, and may load it next
            dist.barrier()


def _is_shared(name: str) -> bool:
    """Whether several modules may have the tensor; those of a file share no memory."""
    return ".table." in name or name.endswith(".coefficients")


def load(adapters: Adapters, directory: str | os.PathLike[str]) -> None:
    """Restore a checkpoint; see ``Adapters.load``."""
    state, tensors = _read(Path(directory))
    try:
        restore(adapters, state | {"tensors": tensors})
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _write(path: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """The tensors, then the JSON that names their file; then what older checkpoints left is deleted."""
    path.mkdir(parents=True, exist_ok=True)
    tensor_file = f"lrlora_adapters-{uuid.uuid4().hex}.safetensors"
    draft = path / tensor_file.removesuffix(".safetensors")
    draft.mkdir()  # safetensors, too, begins with a file of another name
    try:
        write_tensors(tensors, draft / tensor_file)
        (draft / STATE_FILE).write_text(json.dumps({**state, "tensors": tensor_file}, indent=1))
    except OSError:
        shutil.rmtree(draft)  # on a full disk, what was written is in the way
        raise
    heed_umask(draft)
    for file in (tensor_file, STATE_FILE):
        _sync(draft / file)
        (draft / file).replace(path / file)
        _sync(path)
    for old in path.glob("lrlora_adapters-*"):
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != tensor_file:
            old.unlink()


def contents(path: Path) -> tuple[list[tuple[Method, list[str]]], dict[str, Any], torch.dtype]:
    """The methods of a checkpoint with the names of their adapters, the adapters' settings, and their dtype.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is damaged, of a newer version, or has a method that this version does not know.
    """
    state, tensors = _read(path)
    try:
        served = [(_method(entry), list(entry["adapters"])) for entry in state["methods"]]
        name, settings = next(iter(state["modules"].items()))
        dtype = tensors[f"{name}.{_keys(settings)[-1]}"].dtype
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} is damaged ({error!r}); load another checkpoint") from error
    return served, state["modules"], dtype


def _method(entry: Mapping[str, Any]) -> Method:
    known = vars(methods).get(entry["method"])
    if known is None:
        raise ValueError(
            f"the checkpoint has the method {entry['method']!r}, which this version does not know; update lrlora_ops"
        )
    return known(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry["settings"].items()})


def _policy_state(adapters: Adapters) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The policies' states, tensors apart from the rest."""
    tensors: dict[str, Tensor] = {}
    rest = []
    for index, policy in enumerate(adapters.policies):
        state = policy.state_dict()
        tensors |= {f"policies.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        rest.append({key: value for key, value in state.items() if not isinstance(value, Tensor)})
    return tensors, rest


def _state_of_policy(index: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``_policy_state`` took apart."""
    prefix = f"policies.{index}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return own | state["policies"][index]


def _keys(settings: Mapping[str, Any]) -> list[str]:
    """The names of an adapter's tensors within its state dict."""
    pools = [f"{name}." if name else "" for name in settings["features"]]
    own = ["coefficients"] if "num_coefficients" in settings else []
    own += ["lora_A", "lora_B"]
    return ["table.components", "table.ranks", *(f"{pool}{name}" for pool in pools for name in own)]


def _describe(adapters: Adapters) -> list[dict[str, Any]]:
    """The methods as JSON gives them back."""
    served: list[tuple[Any, list[str]]] = adapters.methods
    described = [{"method": type(m).__name__, "settings": asdict(m), "adapters": names} for m, names in served]
    return json.loads(json.dumps(described))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path} holds no {STATE_FILE}; give the directory that Adapters.save wrote")
    try:
        state = json.loads((path / STATE_FILE).read_text())
        version = int(state["version"])
        tensors = load_file(path / state["tensors"]) if version <= VERSION else {}
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); load another checkpoint") from error
    if version > VERSION:
        raise ValueError(f"{path} has format version {version}, and this library reads {VERSION}; update lrlora_ops")
    return state, tensors


def _check(adapters: Adapters, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The checkpoint is of these adapters and these methods, and agrees with itself."""
    modules = {name: module.settings() for name, module in adapters.modules.items()}
    for name in sorted(state["modules"].keys() ^ modules.keys()):
        raise ValueError(f"the checkpoint {'has' if name in state['modules'] else 'lacks'} the adapter {name}; {_SAME}")
    for name, settings in state["modules"].items():
        here = modules[name] | {key: settings[key] for key in ("max_rank", "pool_size")}
        if settings != here:
            raise ValueError(f"{name} is {settings} in the checkpoint and {here} in this model; {_SAME}")
        _check_tensors(name, settings, tensors)
    described = _describe(adapters)
    if state["methods"] != described:
        raise ValueError(f"the checkpoint's methods are {state['methods']}, and here they are {described}; {_SAME}")
    for index, (method, names) in enumerate(adapters.methods):
        trial = method.policy(
            {name: _as_made(adapters.tables[name], method) for name in names if name in adapters.tables}
        )
        trial.load_state_dict(_state_of_policy(index, state, tensors))


def _as_made(table: RankTable, method: Method) -> RankTable:
    """A table as an adapter of this method starts with: its own may be compacted."""
    experts, pool_rank = table.num_experts, getattr(method, "pool_rank", method.max_rank)
    pool_rank = method.max_rank if experts == 1 else pool_rank
    return RankTable(experts, method.max_rank, experts * pool_rank, num_projections=table.num_projections)


def _check_tensors(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The tensors have the shapes, and the table the range, that the settings say."""
    experts, most, size = settings["num_experts"], settings["max_rank"], settings["pool_size"]
    shapes = {"table.components": [experts, most], "table.ranks": [experts]}
    for pool, (in_features, out_features) in settings["features"].items():
        prefix = f"{pool}." if pool else ""
        shapes |= {f"{prefix}lora_A": [size, in_features], f"{prefix}lora_B": [size, out_features]}
        if "num_coefficients" in settings:
            shapes[f"{prefix}coefficients"] = [settings["num_coefficients"]]
    for key, shape in shapes.items():
        found = list(tensors[f"{name}.{key}"].shape)
        if found != shape:
            raise ValueError(f"{name}.{key} has shape {found}, its settings say {shape}; load another checkpoint")
    ranks, components = (tensors[f"{name}.table.{key}"].tolist() for key in ("ranks", "components"))
    live = [row for own, rank in zip(components, ranks, strict=True) for row in own[: max(rank, 0)]]
    reserved = [list(range(first, first + most)) for first in range(0, experts * most, most)] if most else components
    sound = all(0 <= rank <= most for rank in ranks) and len(set(live)) == len(live) and set(live) <= set(range(size))
    if not sound or (size == experts * most and components != reserved):
        raise ValueError(f"{name} has a rank table that contradicts its tensors; load another checkpoint")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """``save_file`` of safetensors, with the error of any other file: a full disk is an OSError with its number."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def heed_umask(directory: Path) -> None:
    """Give the files of a new directory the mode that a new file has; safetensors keeps its own to their owner."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
