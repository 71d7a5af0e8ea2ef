"""Which modules of a model get an adapter, and by which method: name patterns and their matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lrlora_ops.methods import Method
from lrlora_ops.modules import VariableRankLoRALinear

ALL_LINEAR = "all-linear"


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a dotted module name, or the end of it from a dot on (``q_proj``, ``*.mlp.*``)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find_targets(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules to adapt, by name.

    Args:
        model: Its ``nn.Linear`` layers are candidates; for an exact pattern any layer with ``in_features`` is.
        targets: "all-linear" (every ``nn.Linear`` but the output embeddings), one pattern, or several;
            None for the adapters that the model already has.

    Raises:
        ValueError: Nothing matches; the message lists what could be named.
    """
    modules = _outside_adapters(model)
    if targets is None:
        found = {name: m for name, m in modules.items() if isinstance(m, VariableRankLoRALinear)}
        if not found:
            raise ValueError("the model has no VariableRankLoRALinear to adopt; name layers, e.g. targets='all-linear'")
        return found
    head = _output_embeddings(model)
    candidates = {name: m for name, m in modules.items() if _is_linear(m)}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    found = {}
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            hits = {name: m for name, m in candidates.items() if isinstance(m, nn.Linear) and m is not head}
        else:
            hits = {name: m for name, m in candidates.items() if matches(name, pattern)}
        if not hits:
            raise ValueError(f"target {pattern!r} matches no linear layer of the model; it has {_examples(candidates)}")
        found |= hits
    return found


def choose_methods(
    names: Sequence[str], method: Method | Mapping[str, Method]
) -> list[tuple[Method, list[str]]]:
    """Each method with the names that it serves; the first pattern that matches a name wins.

    Raises:
        ValueError: A name matches no pattern, or a pattern no name.
    """
    if not isinstance(method, Mapping):
        return [(method, list(names))]
    served: dict[str, list[str]] = {pattern: [] for pattern in method}
    for name in names:
        pattern = next((p for p in method if p == ALL_LINEAR or matches(name, p)), None)
        if pattern is None:
            raise ValueError(f"{name} is a target, but none of the methods' patterns {list(method)} matches it; add one")
        served[pattern].append(name)
    for pattern, chosen in served.items():
        if not chosen:
            raise ValueError(f"the method for {pattern!r} matches no target; remove it, or widen targets")
    return [(method[pattern], chosen) for pattern, chosen in served.items()]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model holds ``old``, also where a layer is shared."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def _outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    adapters = [f"{name}." if name else "" for name, m in modules.items() if isinstance(m, VariableRankLoRALinear)]
    return {name: m for name, m in modules.items() if name and not any(name.startswith(prefix) for prefix in adapters)}


def _is_linear(module: nn.Module) -> bool:
    return not isinstance(module, VariableRankLoRALinear) and (
        isinstance(module, nn.Linear) or hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _examples(candidates: Mapping[str, nn.Module]) -> str:
    if not candidates:
        return "no linear layers"
    names = list(candidates)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
