"""The layers of a model as ``plan`` wants them: from one forward pass on the meta device, which has no values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrlora_ops._storage import held_bytes, saved_bytes, storage_of
from lrlora_ops.modules._interface import expert_features, expert_projections, is_experts
from lrlora_ops.plan import Layer


@dataclass(frozen=True)
class Trace:
    """What a step of the frozen model holds, in bytes, and the layers to adapt.

    Attributes:
        layers: The targets, in the order of the forward.
        weights: Of all parameters.
        saved: What autograd keeps for backward without any adapter, but for attention matrices, of which fused
            attention keeps none.
        logits: The model's output in its dtype, and twice in fp32, which a cross entropy makes of it.
    """

    layers: tuple[Layer, ...]
    weights: int
    saved: int
    logits: int


def trace(model: Any, targets: Mapping[str, nn.Module], tokens: int) -> Trace:
    """Run one row of tokens through a frozen model on the meta device.

    Args:
        model: A language model of transformers on the meta device; its parameters are frozen here.
        targets: The layers to adapt, by name.
        tokens: Length of the row.

    Raises:
        ValueError: The forward does not call a target.
        RuntimeError: The model's forward depends on values.
    """
    model.requires_grad_(False).train()
    model.config.get_text_config().use_cache = True  # without a cache, transformers looks into position_ids
    calls: dict[str, tuple[Any, ...]] = {}  # holds on to every input, so that no two share a storage by chance
    handles = [module.register_forward_pre_hook(_note(calls, name)) for name, module in targets.items()]
    embeddings = model.get_input_embeddings().weight
    x = torch.empty(1, tokens, embeddings.shape[1], dtype=embeddings.dtype, device="meta", requires_grad=True)
    outputs: list[Any] = []
    try:
        with _GroupedMmOfAnyDtype():
            saved = saved_bytes(
                lambda: outputs.append(model(inputs_embeds=x)),
                [*model.parameters(), *model.buffers()],
                leave_out=lambda tensor: _is_attention(tensor, tokens),
            )
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in targets if name not in calls]:
        raise ValueError(f"the forward does not call {', '.join(missing[:3])}; leave it out of targets")
    sources: dict[int, int] = {}
    layers = []
    for name, args in calls.items():
        source = sources.setdefault(storage_of(args[0]), len(sources))
        layers.append(_layer(name, targets[name], args, source))
    logits = outputs[0][0].numel() * (outputs[0][0].element_size() + 8)
    return Trace(tuple(layers), held_bytes(model.parameters()), saved, logits)


class _GroupedMmOfAnyDtype(TorchFunctionMode):
    """On the meta device ``grouped_mm`` takes bf16 alone; one expert's product has its shape, and keeps as much."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def _note(calls: dict[str, tuple[Any, ...]], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.setdefault(name, args)

    return hook


def _layer(name: str, module: Any, args: tuple[Any, ...], source: int) -> Layer:
    x = args[0]
    if is_experts(module):
        names = expert_projections(module)
        features = tuple(expert_features(module, projection) for projection in names)
        weight = getattr(module, names[0])
        return Layer(name, weight.shape[0], features, x.shape[0], args[1].numel(), x.element_size(), source)
    rows = math.prod(x.shape[:-1])
    return Layer(name, 1, ((module.in_features, module.out_features),), rows, rows, x.element_size(), source)


def _is_attention(tensor: Tensor, tokens: int) -> bool:
    """A matrix per head, ``[.., heads, tokens, tokens]``; activations of one row have no other dimension."""
    return tensor.dim() > 2 and tensor.shape[-2:] == (tokens, tokens) and math.prod(tensor.shape[:-2]) > 1
