"""One forward and backward of a model whose adapters all do something for its duration, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops.adapters import Adapters
from lrlora_ops.methods import LearnedRank

_UPDATE = 0.05  # size of the updates that the probe gives: a twentieth of the inputs, about
_SEED = 0


@dataclass
class Probe:
    """What one pass showed.

    Attributes:
        called: Names of the adapters that the forward called.
        infinite: Names of the adapters whose output was not finite, in the order of the forward.
        output_finite: Whether the model's output was.
        moved: Whether the updates, all together, changed the output.
        differentiable: Whether the output has a gradient at all.
        error: What stopped the pass; "" if nothing did.
    """

    called: set[str] = field(default_factory=set)
    infinite: list[str] = field(default_factory=list)
    output_finite: bool = True
    moved: bool = False
    differentiable: bool = False
    error: str = ""


def probe(adapters: Adapters, inputs: Any) -> Probe:
    """Run the model in training mode without and with updates, then backward; the gradients stay where autograd puts
    them. To be called within ``undisturbed``.

    Args:
        adapters: Of the model.
        inputs: As ``examine`` takes them.
    """
    seen = Probe()
    handles = [module.register_forward_hook(_watch(seen, name)) for name, module in adapters.modules.items()]
    try:
        with torch.no_grad():
            _set_updates(adapters, 0.0)
            without = _run(adapters.model, inputs)
            seen.called.clear()
            seen.infinite.clear()
            _set_updates(adapters, _UPDATE)
        outputs = _run(adapters.model, inputs)
        seen.output_finite = all(bool(output.isfinite().all()) for output in outputs)
        seen.moved = any(not torch.equal(old, new) for old, new in zip(without, outputs, strict=True))
        loss = sum(
            ((out.float() * torch.randn_like(out, dtype=torch.float32)).sum() for out in outputs), torch.zeros(())
        )
        seen.differentiable = loss.requires_grad
        if seen.differentiable:
            loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        seen.error = " ".join(str(error).split())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _watch(seen: Probe, name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.called.add(name)
        if isinstance(output, Tensor) and not output.isfinite().all():
            seen.infinite.append(name)

    return hook


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(_SEED)  # dropout is the same in each run
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*_arguments(inputs))
    found = list(_floating(output))
    if not found:
        raise ValueError(
            f"the model returns a {type(output).__name__} without a floating-point tensor to differentiate; "
            "give a batch for which it returns logits or a loss"
        )
    return found


def _arguments(inputs: Any) -> Sequence[Any]:
    return inputs if isinstance(inputs, (tuple, list)) else (inputs,)


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _floating(value)


@torch.no_grad()
def _set_updates(adapters: Adapters, size: float) -> None:
    """Random B in the live components, whose updates are ``size`` times their inputs, about; what is infinite stays."""
    for module in adapters.modules.values():
        live = module.table.live_rows()
        ranks = max(float(module.table.ranks.max()), 1.0)
        std = size / (math.sqrt(ranks) * (abs(module.scaling) or 1.0))
        for pool in module.pools().values():
            finite = pool.lora_B.isfinite()
            pool.lora_B.copy_(torch.where(finite, torch.randn_like(pool.lora_B) * std * live[:, None], pool.lora_B))


@contextmanager
def undisturbed(adapters: Adapters) -> Iterator[None]:
    """Training mode in which a learning method samples nothing; at the end parameters, buffers, gradients, statistics,
    modes and random numbers are what they were, bit for bit."""
    model, tables = adapters.model, list(adapters.tables.values())
    values = [*model.buffers(), *adapters.parameters()]
    values += [value for table in tables for value in (table.train_ranks, table.gate)]
    leaves = [*model.parameters(), *(leaf for table in tables for leaf in (table.gate, table.demand))]
    copies = [value.detach().clone() for value in values]
    gradients = [leaf.grad for leaf in leaves]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({leaf.device.index for leaf in leaves if leaf.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            for leaf in leaves:
                leaf.grad = None
            model.train()
            for policy, (method, _) in zip(adapters.policies, adapters.methods, strict=True):
                if isinstance(method, LearnedRank) and not policy.frozen:
                    for table in policy.tables.values():  # type: ignore[attr-defined]
                        table.reset_training_state()
            yield
    finally:
        with torch.no_grad():
            for value, held in zip(values, copies, strict=True):
                value.copy_(held)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        for module, mode in modes:
            module.training = mode
