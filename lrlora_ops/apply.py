"""apply_lora and load_adapter: a model gets its adapters, new ones or a checkpoint's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrlora_ops import _checkpoint
from lrlora_ops._metrics import kind
from lrlora_ops._sharding import is_sharded
from lrlora_ops._targets import call_every_layer, choose_methods, find_adapters, find_targets
from lrlora_ops.adapters import Adapters
from lrlora_ops.methods import Method, SincUpdate
from lrlora_ops.modules import SincLoRAExperts, SincLoRALinear, VariableRankLoRAExperts, VariableRankLoRALinear
from lrlora_ops.modules._adapter import RankAdapter, replace_module, set_ranks, silence_dead, unique_tables
from lrlora_ops.modules._interface import is_experts
from lrlora_ops.modules._quantised import keep_differentiable
from lrlora_ops.modules._sinc import SincPool


def apply_lora(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    targets: str | Sequence[str] | None = None,
    *,
    lora_alpha: float | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Adapters:
    """Give layers of a model an adapter each, in place, and a method that rules their ranks.

    Args:
        model: Any ``nn.Module``. With ``targets`` all its parameters are frozen but the adapters'.
        method: ``FixedRank``, ``LearnedRank``, ...; or patterns and the method of each, first match wins.
        targets: "all-linear" (every ``nn.Linear`` but the output embeddings, and layers whose weight another module
            reads past an adapter, as Mamba's mixers do), "experts" (every experts module of transformers'
            Mixture-of-Experts layers), a name or glob such as ``q_proj`` or ``model.layers.*.mlp.*`` (matched against
            the whole name or its end from a dot on), or several. None adopts the adapters that the model already has,
            sets their rank to the method's, and freezes nothing; if it has none and ``method`` is a mapping, its
            patterns are the targets: ``{"experts": DynamicRank(), "all-linear": LearnedRank()}``.
        lora_alpha: Of new adapters; default ``2 * max_rank``.
        dropout: Of new adapters of linear layers; experts have none.
        dtype: Of the new adapters' parameters; default fp32.

    Returns:
        The handle for training, saving and merging.

    Raises:
        ValueError: A target matches nothing, or a setting does not fit; the model is unchanged then.
    """
    inner = _inner(model)
    if targets is None and isinstance(method, Mapping) and not find_adapters(inner):
        targets = list(method)
    if targets is not None:
        _require_no_ddp(model)
    model = inner
    found = find_targets(model, targets)
    served = choose_methods(found, method)
    return apply_methods(
        model, found, served, adopt=targets is None, lora_alpha=lora_alpha, dropout=dropout, dtype=dtype
    )


def apply_methods(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    served: Sequence[tuple[Method, Sequence[str]]],
    *,
    adopt: bool = False,
    lora_alpha: float | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Adapters:
    """``apply_lora`` for layers that are found already.

    Args:
        model: As there.
        found: The layers to adapt by name, or the adapters to adopt.
        served: Each method with the names that it serves.
        adopt: Whether ``found`` are adapters of the model.
        lora_alpha, dropout, dtype: As there.
    """
    if not adopt:
        _require_undivided(found)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        modules = {
            name: _adapter(name, found[name], chosen, lora_alpha=lora_alpha, dropout=dropout, dtype=dtype)
            for chosen, names in served
            for name in names
        }
        for chosen, names in served:  # on copies: it may raise, and it may set ranks
            chosen.policy(copy.deepcopy(unique_tables({name: modules[name] for name in names})))
            _check_shared(chosen, {name: modules[name] for name in names})
    except Exception:
        for parameter in trainable:
            parameter.requires_grad_()
        raise
    if not adopt:
        model.requires_grad_(False)
        for name, module in modules.items():
            module.install(model, found[name])
    for chosen, names in served:
        own = [modules[name] for name in names]
        for table in unique_tables(dict(zip(names, own, strict=True))).values():
            set_ranks(own, table, [chosen.initial_rank] * table.num_experts)
        silence_dead(own)
        _share_coefficients(chosen, {name: modules[name] for name in names})
    call_every_layer(model)
    keep_differentiable(model)
    return Adapters(model, modules, served)


def _inner(model: nn.Module) -> nn.Module:
    """The model within what ``torch.compile`` or DDP made of it, whose names for the layers are in no checkpoint."""
    while True:
        held = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if held is model:
            return model
        model = held


def _require_no_ddp(model: nn.Module) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, which would not average the gradients of parameters that are new "
            "to it: adapt the model first, then wrap it"
        )


def _require_undivided(found: Mapping[str, nn.Module]) -> None:
    for name, module in found.items():
        if any(is_sharded(parameter) for parameter in module.parameters()):
            raise ValueError(
                f"{name} is divided among processes: adapt the model before fully_shard divides it, and load it "
                "without tensor or expert parallelism (tp_size, ep_size), under which a process does not have all the "
                "outputs or experts that a rank is for"
            )


def load_adapter(
    model: nn.Module, directory: str | PathLike[str], method: Method | Mapping[str, Method] | None = None
) -> Adapters:
    """Give a model the adapters of a checkpoint, in place: of ``Adapters.save``, or a stock LoRA of PEFT.

    The first continues bit for bit, with its methods. Of the second, linear layers and the experts' parameters of
    transformers are read, with a rank and alpha each, rank-stabilised or not, as PEFT 0.18 and later write them. The
    outputs are PEFT's, which is not needed; the parameters are fp32.

    Args:
        model: The base model that the checkpoint was trained on.
        directory: Holds ``lrlora_state.json``, or ``adapter_config.json`` and ``adapter_model.safetensors``.
        method: For a LoRA of PEFT: what rules the ranks from now on; its initial rank must be the checkpoint's or
            more. Default: a ``FixedRank`` of each adapter's own rank.

    Returns:
        What ``apply_lora`` returns; all other parameters of the model are frozen.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged, holds what cannot be represented (DoRA, biases, ...), does not fit the model, or has
            ranks above the method's; the model is unchanged then.
    """
    _require_no_ddp(model)
    model, path = _inner(model), Path(directory)
    if (path / _checkpoint.STATE_FILE).exists():
        if method is not None:
            raise ValueError(f"{path} holds adapters with methods of their own; leave method out")
        return _restore(model, path)
    from lrlora_ops.integrations import peft_import

    return peft_import.load(model, path, method)


def _restore(model: nn.Module, path: Path) -> Adapters:
    served, settings, dtype = _checkpoint.contents(path)
    found = find_targets(model, list(settings))
    for name in sorted(found.keys() - settings.keys()):
        wanted = next(saved for saved in settings if name.endswith(saved))
        raise ValueError(f"{wanted} of the checkpoint is {name} here; give the model that was saved, not one around it")
    _require_undivided(found)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = apply_methods(model, found, served, dtype=dtype)
    try:
        for name, module in adapters.modules.items():
            module.scaling, module.dropout = settings[name]["scaling"], settings[name]["dropout"]
            module.lora_alpha = module.scaling * module.max_rank
        adapters.load(path)
    except Exception:
        for name, module in adapters.modules.items():
            host = model.get_submodule(name)
            replace_module(model, host, module.plain(host))
        for parameter in trainable:
            parameter.requires_grad_()
        raise
    return adapters


def _adapter(name: str, layer: nn.Module, method: Method, **options: Any) -> RankAdapter:
    """The layer itself if it is an adapter, or a new one for it."""
    if isinstance(layer, RankAdapter):
        _check_adopted(name, layer, method)
        return layer
    try:
        if isinstance(method, SincUpdate):
            return _sinc_adapter(layer, method, **options)
        options |= {"max_rank": method.max_rank, "rank": method.initial_rank}
        if not is_experts(layer):
            return VariableRankLoRALinear.from_linear(layer, **options)
        if options.pop("dropout"):
            raise ValueError("experts have no dropout; leave it 0, or leave the experts out of targets")
        return VariableRankLoRAExperts.for_experts(layer, pool_rank=getattr(method, "pool_rank", None), **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_adopted(name: str, layer: RankAdapter, method: Method) -> None:
    if isinstance(layer, SincLoRALinear | SincLoRAExperts) != isinstance(method, SincUpdate):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, which {type(method).__name__} cannot rule: SincUpdate is for "
            "SincLoRALinear and SincLoRAExperts, and every other method for the others"
        )
    if isinstance(method, SincUpdate):
        has, wanted = (layer.max_rank, layer.settings()["num_coefficients"]), (method.rank, method.num_coefficients)
        if has != wanted:
            raise ValueError(f"{name} has (rank, num_coefficients) {has}, but the method {wanted}; make them equal")
    elif layer.max_rank < method.initial_rank:
        raise ValueError(
            f"{name} has max_rank {layer.max_rank}, but the method needs {method.initial_rank}; make the layer "
            "larger with resize, or lower the method's rank"
        )


def _sinc_adapter(
    layer: nn.Module, method: SincUpdate, *, dropout: float, **options: Any
) -> SincLoRALinear | SincLoRAExperts:
    if dropout:
        raise ValueError("SincUpdate has no dropout, for the layer and its update are one product; leave it 0")
    make = SincLoRAExperts.for_experts if is_experts(layer) else SincLoRALinear.from_linear
    settings: dict[str, Any] = {"rank": method.rank, "num_coefficients": method.num_coefficients, "grid": method.grid}
    return make(layer, **settings, **options)


def _sharing(method: Method, modules: Mapping[str, RankAdapter]) -> list[dict[str, SincPool]]:
    """The projections that shall share their coefficients, group by group."""
    if not isinstance(method, SincUpdate) or method.share == "layer":
        return []
    groups: dict[str, dict[str, SincPool]] = {}
    for name, module in modules.items():
        for projection, pool in module.pools().items():
            full_name = f"{name}.{projection}" if projection else name
            if isinstance(pool, SincPool):
                groups.setdefault(kind(full_name) if method.share == "type" else "", {})[full_name] = pool
    return list(groups.values())


def _check_shared(method: Method, modules: Mapping[str, RankAdapter]) -> None:
    for group in _sharing(method, modules):
        devices = {pool.coefficients.device for pool in group.values()}
        if len(devices) > 1:
            raise ValueError(
                f"layers on several devices, {sorted(map(str, devices))}, cannot share coefficients: "
                f"{', '.join(list(group)[:3])}, ...; use SincUpdate(share='layer')"
            )


def _share_coefficients(method: Method, modules: Mapping[str, RankAdapter]) -> None:
    for group in _sharing(method, modules):
        first = next(iter(group.values()))
        for pool in group.values():
            pool.coefficients = first.coefficients
