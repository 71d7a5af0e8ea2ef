"""Which modules of a model get an adapter, and by which method: name patterns and their matches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lrlora_ops._read_past import layers_read_past
from lrlora_ops.methods import Method
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._experts import ExpertsAdapter
from lrlora_ops.modules._interface import CHILD, is_experts

ALL_LINEAR, EXPERTS = "all-linear", "experts"


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a dotted module name, or the end of it from a dot on (``q_proj``, ``*.mlp.*``)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find_targets(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules to adapt, by name.

    Args:
        model: Its ``nn.Linear`` layers and experts modules are candidates; for an exact pattern any layer with
            ``in_features`` is.
        targets: "all-linear" (every ``nn.Linear`` but the output embeddings, layers whose weight another module reads
            past an adapter and routers that are one by their class alone), "experts", one pattern, or several; None
            for the adapters that the model already has.

    Warns:
        UserWarning: A layer is called on some paths, and on others its weight is read past it, as Mamba's mixers do
            where their kernels are installed.

    Raises:
        ValueError: Nothing matches, or the model has adapters already; the message lists what could be named.
    """
    if isinstance(model, (nn.Linear, RankAdapter)) or is_experts(model):
        raise ValueError(f"the model is itself a {type(model).__name__}; give a module that holds it")
    adapters = find_adapters(model)
    if targets is None:
        if not adapters:
            raise ValueError("the model has no adapters to adopt; name layers, e.g. targets='all-linear'")
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


def find_adapters(model: nn.Module) -> dict[str, RankAdapter]:
    """The adapters in a model, by the name of the layer or of the experts module that they adapt."""
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, RankAdapter))
    return {name.removesuffix(f".{CHILD}") if isinstance(m, ExpertsAdapter) else name: m for name, m in named}


def unadapted_experts(model: nn.Module) -> list[str]:
    """Names of the experts modules without an adapter."""
    return [name for name, m in model.named_modules() if is_experts(m) and not hasattr(m, CHILD)]


def _find(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    experts = {name: m for name, m in modules.items() if is_experts(m)}
    if pattern == EXPERTS:
        return _require_experts(modules, experts)
    linear = {name: m for name, m in modules.items() if hasattr(m, "in_features") and hasattr(m, "out_features")}
    read_past = layers_read_past(model)
    routers = linear_routers(model)
    hits: dict[str, nn.Module]
    if pattern == ALL_LINEAR:
        left_out = {id(m) for m in [*output_embeddings(model), *routers]}
        found = {name: m for name, m in linear.items() if isinstance(m, nn.Linear) and id(m) not in left_out}
        hits = {name: m for name, m in found.items() if id(m) not in read_past}
        _warn_of_reads(found, read_past, "'all-linear' leaves out {}, name them to adapt them all the same")
    else:
        hits = {name: m for name, m in (linear | experts).items() if matches(name, pattern)}
        _warn_of_reads(hits, read_past, f"target {pattern!r} matches {{}}, leave them out unless you know the path")
    for name, module in hits.items():
        reader, called = read_past.get(id(module), ("", True))
        if not called:
            raise ValueError(
                f"target {pattern!r} matches {name}, whose weight {reader} reads without calling the layer, so that an "
                "adapter there would do nothing; leave it out of targets"
            )
        if any(module is other for other in routers):
            raise ValueError(
                f"target {pattern!r} matches {name}, a {type(module).__name__}, which returns choices of experts and "
                "not a linear layer's output; leave it out of targets"
            )
    if not hits:
        others = {f"{name} ({type(m).__name__})": m for name, m in modules.items() if matches(name, pattern)}
        raise ValueError(
            f"target {pattern!r} matches no linear layer, one with in_features and out_features; it matches "
            f"{_examples(others)}, and the linear layers are {_examples(linear)}"
        )
    return hits


def _warn_of_reads(layers: Mapping[str, nn.Module], read_past: Mapping[int, tuple[str, bool]], text: str) -> None:
    """Of those that are called on some paths and passed by on others."""
    passed = {name: m for name, m in layers.items() if read_past.get(id(m), ("", False))[1]}
    if passed:
        readers = ", ".join(sorted({read_past[id(module)][0] for module in passed.values()}))
        reason = f"on some paths {readers} reads their weight without calling the layer, which passes an adapter by"
        warnings.warn(f"{text.format(_examples(passed))}: {reason}", stacklevel=2)


def _require_experts(modules: dict[str, nn.Module], experts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if not experts:
        others = {f"{name} ({type(m).__name__})": m for name, m in modules.items() if name.endswith("experts")}
        raise ValueError(
            "target 'experts' matches nothing: no module of the model is on transformers' experts interface "
            f"(use_experts_implementation); modules that are named experts: {_examples(others)}. Use a model that is "
            "on it, or name linear layers, e.g. targets='all-linear'"
        )
    return experts


def choose_methods(
    found: Mapping[str, nn.Module], method: Method | Mapping[str, Method]
) -> list[tuple[Method, list[str]]]:
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
        return [(method, list(found))]
    served: dict[str, list[str]] = {pattern: [] for pattern in method}
    for name, module in found.items():
        keyword = EXPERTS if is_experts(module) or isinstance(module, ExpertsAdapter) else ALL_LINEAR
        pattern = next((p for p in method if p == keyword or matches(name, p)), None)
        if pattern is None:
            raise ValueError(f"{name} is a target, but no method's pattern matches it: {list(method)}; add one")
        served[pattern].append(name)
    for pattern, chosen in served.items():
        if not chosen:
            raise ValueError(f"the method for {pattern!r} matches no target; remove it, or widen targets")
    return [(method[pattern], chosen) for pattern, chosen in served.items()]


def call_every_layer(model: nn.Module) -> None:
    """Turn off PyTorch's fused encoder layer: in evaluation it reads the weights of its linear layers and would pass
    their adapters by."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def linear_routers(model: nn.Module) -> list[nn.Module]:
    """Linear layers by their class alone, which return choices of experts."""
    return [module for parent in model.modules() for module in parent.children() if _is_router(module, parent)]


def _is_router(module: nn.Module, parent: nn.Module) -> bool:
    """Whether it is a linear layer by its class alone, as phimoe's router is, which returns weights and choices."""
    beside_experts = any(is_experts(sibling) for sibling in parent.children())
    return (
        beside_experts
        and isinstance(module, nn.Linear)
        and type(module).__module__ == type(parent).__module__  # not a quantised linear layer
        and type(module).forward is not nn.Linear.forward
    )


def output_embeddings(model: nn.Module) -> list[nn.Module]:
    """Of the model and of models that it holds."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return [getter() for getter in getters if callable(getter)]


def _examples(modules: Mapping[str, nn.Module]) -> str:
    names = list(modules)
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
