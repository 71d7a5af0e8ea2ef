"""Adapters become a stock LoRA checkpoint of Hugging Face PEFT.

PEFT has one rank per linear layer and one per expert parameter. Experts are padded to the largest of theirs with zero
rows, the scaling goes into ``lora_B``, and ``lora_alpha`` equals ``r``, so that every loader computes the same update.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lrlora_ops.adapters import Adapters
from lrlora_ops.integrations._factors import Factors, all_factors, check_linear
from lrlora_ops.integrations._peft_layout import expert_matrices, is_swapped
from lrlora_ops.modules import VariableRankLoRAExperts, VariableRankLoRALinear
from lrlora_ops.modules._interface import is_experts
from lrlora_ops.modules._merge import check_merged_experts

# In models with experts PEFT takes a target of such a name for experts as transformers 4 had them, and finds none.
# A linear layer of that name therefore goes by its parameter.
_OLD_EXPERT_NAMES = ("w1", "w2", "w3", "gate", "gate_proj", "up_proj", "down_proj")


def write(adapters: Adapters, directory: Path) -> None:
    """Write the adapters as a LoRA checkpoint of the installed PEFT.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: An adapter has no counterpart in PEFT, or all have rank 0.
    """
    found = all_factors(adapters, "PEFT")
    model = _peft_model(adapters, found)
    for name, projections in found.items():
        for projection, (a, b) in projections.items():
            layer = _layer(model, name, projection)
            first, second = a[0], b[0].mT
            if projection:
                transposed = layer.get_base_layer().is_transposed
                swapped = is_swapped(layer.in_features, a.shape[2], b.shape[2], transposed, _peft().__version__)
                first, second = expert_matrices(a, b, swapped)
            for linear, weight in ((layer.lora_A.default, first), (layer.lora_B.default, second)):
                if linear.weight.shape != weight.shape:
                    raise RuntimeError(
                        f"{name}.{projection}: PEFT {_peft().__version__} has {tuple(linear.weight.shape)} for what is "
                        f"{tuple(weight.shape)} here; please report this with both versions"
                    )
                linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    model.save_pretrained(directory)


def check(adapters: Adapters, directory: Path) -> float:
    """Load a checkpoint into a PEFT model of the same weights, and compare it layer by layer on random inputs.

    Returns:
        The largest difference, relative to the norm of the layer's output.

    Raises:
        RuntimeError: A layer differs by more than rounding.
    """
    model = _peft().PeftModel.from_pretrained(adapters.unadapted(), directory)
    differences = [0.0]
    for name, module in adapters.modules.items():
        host, layer = adapters.model.get_submodule(name), model.base_model.model.get_submodule(name)
        if isinstance(module, VariableRankLoRAExperts):
            plain = layer
            while hasattr(plain, "base_layer"):
                plain = plain.base_layer
            differences.append(check_merged_experts(host, layer, plain))
        elif isinstance(module, VariableRankLoRALinear):
            differences.append(check_linear(module, layer))
    return max(differences)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("the PEFT format needs peft, to write and to check it: pip install peft") from error
    return peft


def _peft_model(adapters: Adapters, found: Mapping[str, Factors]) -> Any:
    """A PEFT model with LoRA where the adapters are; it shares the model's weights."""
    modules: dict[str, int] = {}
    parameters: dict[str, int] = {}
    has_experts = any(is_experts(module) for module in adapters.model.modules())
    for name, projections in found.items():
        for projection, (a, _) in projections.items():
            if projection or (has_experts and name.rpartition(".")[2] in _OLD_EXPERT_NAMES):
                parameters[f"{name}.{projection or 'weight'}"] = a.shape[-2]
            else:
                modules[name] = a.shape[-2]
    ranks = modules | parameters
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    plain = adapters.unadapted()
    config = _peft().LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=_exact(list(modules), plain),
        target_parameters=list(parameters) or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        base_model_name_or_path=getattr(plain, "name_or_path", None) or None,
        inference_mode=True,
    )
    return _peft().get_peft_model(plain, config)


def _exact(names: list[str], model: nn.Module) -> list[str] | str:
    """The names as PEFT's target_modules: as a regular expression where it would also match the end of another's."""
    others = {name for name, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def _layer(model: Any, name: str, projection: str) -> Any:
    """PEFT's layer of an adapter; those of an experts module's parameters are nested."""
    layer = model.base_model.model.get_submodule(name)
    while projection and layer.parameter_name != projection:
        layer = layer.base_layer
    return layer
