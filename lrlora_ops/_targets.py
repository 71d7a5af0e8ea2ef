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
        targets: "all-linear" (every ``nn.Linear`` but the output embeddings and what PyTorch reads past an
            adapter), one pattern, or several; None for the adapters that the model already has.

    Raises:
        ValueError: Nothing matches, or the model has adapters already; the message lists what could be named.
    """
    if isinstance(model, (nn.Linear, VariableRankLoRALinear)):
        raise ValueError(f"the model is itself a {type(model).__name__}; give a module that holds it")
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, VariableRankLoRALinear)}
    if targets is None:
        if not adapters:
            raise ValueError("the model has no VariableRankLoRALinear to adopt; name layers, e.g. targets='all-linear'")
        return dict(adapters)
    if adapters:
        raise ValueError(
            f"the model has adapters already: {_examples(adapters)}; give several methods in one call as a dict of "
            "patterns, adopt these with targets=None, or merge them first"
        )
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty; name layers, e.g. targets='all-linear'")
    found: dict[int, tuple[str, nn.Module]] = {}  # by identity: a shared layer has several names
    for pattern in patterns:
        for name, module in _find(model, pattern).items():
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def _find(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    linear = {name: m for name, m in modules.items() if hasattr(m, "in_features") and hasattr(m, "out_features")}
    bypassed = [m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
    hits: dict[str, nn.Module]
    if pattern == ALL_LINEAR:
        left_out = {id(m) for m in [*_output_embeddings(model), *bypassed]}
        hits = {name: m for name, m in linear.items() if isinstance(m, nn.Linear) and id(m) not in left_out}
    else:
        hits = {name: m for name, m in linear.items() if matches(name, pattern)}
    for name, module in hits.items():
        if any(module is other for other in bypassed):
            raise ValueError(
                f"target {pattern!r} matches {name}, whose weight nn.MultiheadAttention reads without calling the "
                "layer, so that an adapter there would do nothing; leave it out of targets"
            )
    if not hits:
        others = {f"{name} ({type(m).__name__})": m for name, m in modules.items() if matches(name, pattern)}
        raise ValueError(
            f"target {pattern!r} matches no linear layer, one with in_features and out_features; it matches "
            f"{_examples(others)}, and the linear layers are {_examples(linear)}"
        )
    return hits


def choose_methods(names: Sequence[str], method: Method | Mapping[str, Method]) -> list[tuple[Method, list[str]]]:
    """Each method with the names that it serves; the first pattern that matches a name wins.

    Raises:
        ValueError: A name matches no pattern, a pattern no name, or a method is none.
    """
    for candidate in method.values() if isinstance(method, Mapping) else [method]:
        if isinstance(candidate, type) or not hasattr(candidate, "policy"):
            raise ValueError(
                f"method is {candidate!r}; it must be the settings of one, e.g. FixedRank(rank=8), or a dict of "
                "patterns and settings"
            )
    if not isinstance(method, Mapping):
        return [(method, list(names))]
    served: dict[str, list[str]] = {pattern: [] for pattern in method}
    for name in names:
        pattern = next((p for p in method if p == ALL_LINEAR or matches(name, p)), None)
        if pattern is None:
            raise ValueError(f"{name} is a target, but no method's pattern matches it: {list(method)}; add one")
        served[pattern].append(name)
    for pattern, chosen in served.items():
        if not chosen:
            raise ValueError(f"the method for {pattern!r} matches no target; remove it, or widen targets")
    return [(method[pattern], chosen) for pattern, chosen in served.items()]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model holds ``old``, also where a layer is shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def call_every_layer(model: nn.Module) -> None:
    """Turn off PyTorch's fused encoder layer: in evaluation it reads the weights of its linear layers and would pass
    their adapters by."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    """Of the model and of models that it holds."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return [getter() for getter in getters if callable(getter)]


def _examples(modules: Mapping[str, nn.Module]) -> str:
    names = list(modules)
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
