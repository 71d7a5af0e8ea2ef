"""An adapter checkpoint: ``lrlora_state.json`` and the safetensors file that it names.

The JSON is replaced last, in one rename, so a checkpoint is the old one or the new one at every moment.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters

STATE_FILE = "lrlora_state.json"
VERSION = 1
_MODULE_TENSORS = ("lora_A", "lora_B", "table.components", "table.ranks")


def save(adapters: Adapters, directory: str | os.PathLike[str]) -> None:
    """Write the checkpoint; see ``Adapters.save``."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors, policies = _policy_state(adapters)
    for name, module in adapters.modules.items():
        state = module.state_dict()
        tensors |= {f"{name}.{key}": state[key].detach().cpu().contiguous() for key in _MODULE_TENSORS}
    tensor_file = f"lrlora_adapters-{uuid.uuid4().hex}.safetensors"
    state = {
        "version": VERSION,
        "tensors": tensor_file,
        "modules": {name: _settings(module) for name, module in adapters.modules.items()},
        "methods": [_describe(method, names) for method, names in adapters.methods],
        "policies": policies,
    }
    save_file(tensors, path / tensor_file)
    _sync(path / tensor_file)
    draft = path / f"{tensor_file}.json"
    draft.write_text(json.dumps(state, indent=1))
    _sync(draft)
    draft.replace(path / STATE_FILE)
    _sync(path)
    for old in path.glob("lrlora_adapters-*"):
        if old.name != tensor_file:
            old.unlink()


def load(adapters: Adapters, directory: str | os.PathLike[str]) -> None:
    """Restore a checkpoint; see ``Adapters.load``. Everything is checked before anything is written."""
    state, tensors = _read(Path(directory))
    wanted = {name: _settings(module) for name, module in adapters.modules.items()}
    _compare("modules", _without_max_rank(state["modules"]), _without_max_rank(wanted))
    _compare("methods", state["methods"], json.loads(json.dumps([_describe(m, names) for m, names in adapters.methods])))
    missing = [f"{name}.{key}" for name in wanted for key in _MODULE_TENSORS if f"{name}.{key}" not in tensors]
    if missing:
        raise ValueError(f"the checkpoint lacks the tensor {missing[0]}; it is damaged, load another one")
    for name, settings in state["modules"].items():
        _check_tensors(name, settings, tensors)
    for name, module in adapters.modules.items():
        held = state["modules"][name]["max_rank"]
        if module.max_rank != held:
            module.set_rank(min(int(module.rank), held))
            module.resize(held)
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in _MODULE_TENSORS}, strict=False)
    for index, policy in enumerate(adapters.policies):
        prefix = f"policies.{index}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        policy.load_state_dict(own | state["policies"][index])


def _policy_state(adapters: Adapters) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The policies' states, tensors apart from the rest."""
    tensors: dict[str, Tensor] = {}
    rest = []
    for index, policy in enumerate(adapters.policies):
        state = policy.state_dict()
        tensors |= {f"policies.{index}.{key}": v.cpu().contiguous() for key, v in state.items() if isinstance(v, Tensor)}
        rest.append({key: value for key, value in state.items() if not isinstance(value, Tensor)})
    return tensors, rest


def _settings(module: Any) -> dict[str, Any]:
    return {key: getattr(module, key) for key in ("in_features", "out_features", "max_rank", "scaling", "dropout")}


def _describe(method: Any, names: list[str]) -> dict[str, Any]:
    return {"method": type(method).__name__, "settings": asdict(method), "adapters": names}


def _without_max_rank(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in settings.items() if k != "max_rank"} for name, settings in modules.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path} holds no {STATE_FILE}; give the directory that Adapters.save wrote")
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state["version"] > VERSION:
            raise ValueError(f"{path} has format version {state['version']}, this library reads {VERSION}; update it")
        return state, load_file(path / state["tensors"])
    except (json.JSONDecodeError, KeyError, SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); load another checkpoint") from error


def _compare(what: str, saved: Any, wanted: Any) -> None:
    if saved == wanted:
        return
    raise ValueError(
        f"the checkpoint has other {what} than this model: saved {_brief(saved)}, here {_brief(wanted)}; call "
        "apply_lora with the model, method and targets that were saved"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else text[:300] + "..."


def _check_tensors(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The tensors have the shapes, and the table the range, that the settings say."""
    rows = settings["max_rank"]
    shapes = {"lora_A": (rows, settings["in_features"]), "lora_B": (rows, settings["out_features"])}
    shapes |= {"table.components": (1, rows), "table.ranks": (1,)}
    for key, shape in shapes.items():
        found = tuple(tensors[f"{name}.{key}"].shape)
        if found != shape:
            raise ValueError(f"{name}.{key} has shape {found}, its settings say {shape}; the checkpoint is damaged")
    rank = int(tensors[f"{name}.table.ranks"])
    if not 0 <= rank <= rows or not torch.equal(tensors[f"{name}.table.components"][0], torch.arange(rows).int()):
        raise ValueError(f"{name} has a rank table that contradicts its tensors; the checkpoint is damaged")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
