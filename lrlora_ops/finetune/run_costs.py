"""What the updates of a run cost, and what padded LoRA and PEFT would: computed, by ``lrlora_ops.plan``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lrlora_ops.finetune.gpus import GPUS
from lrlora_ops.finetune.runs import Run
from lrlora_ops.plan import Held, Layer, owned_at, peft


def run_costs(run: Run, gpu: str) -> dict[str, Any]:
    """Bytes held in a training step, and floors of its time on a GPU, for the last ranks of the run.

    The rank of a SincUpdate is that of its A and B. It has no other that it could be padded to; beside it stands LoRA
    of the same ranks.

    Args:
        run: Its layers have the sizes.
        gpu: A key of ``GPUS``.

    Returns:
        ``{"gpu": ..., "arms": [...], "frozen": ms}``, or ``{"reason": ...}`` if the run does not have the sizes.
    """
    layers, settings = run.layers, run.start["adapters"]
    coefficients = {name: settings[name]["num_coefficients"] for name in run.adapters["stable rank"]}
    if not layers:
        reason = run.start.get("no_layers", "the history does not have them")
        return {"reason": f"The sizes of this model's layers are not known: {reason}"}
    by_layer = run.by_adapter(run.ranks)
    ranks = [by_layer[layer.name] for layer in layers]
    arms = [_arm("these ranks", layers, ranks, coefficients, gpu)]
    if coefficients:
        arms.append(_arm("LoRA of these ranks", layers, ranks, {}, gpu))
    for rank, which in _padded(run).items():
        padded = [own if layer.name in coefficients else [rank] for layer, own in zip(layers, ranks, strict=True)]
        arms.append(_arm(f"padded to {which}, {rank}", layers, padded, coefficients, gpu))
    mean, most = statistics.fmean(run.ranks), max(run.ranks)
    theirs = sum(layer.peft_cost(mean).milliseconds(GPUS[gpu]) for layer in layers)
    arms.append(_held(f"PEFT at the mean rank, {mean:.3g}", peft(layers, mean, most), theirs))
    frozen = sum(layer.base_cost().milliseconds(GPUS[gpu]) for layer in layers)
    return {"gpu": gpu, "arms": arms, "frozen": frozen, "tokens": max(layer.tokens for layer in layers)}


def _padded(run: Run) -> dict[int, str]:
    """The ranks that LoRA of this run could be padded to, and which each is."""
    by_layer, names = run.by_adapter(run.ranks), run.adapters["rank"]
    if not names:
        return {}
    most = max(rank for name in names for rank in by_layer[name])
    allowed = max(run.start["adapters"][name]["max_rank"] for name in names)
    return {most: "the largest of them", allowed: "the method's maximum"}


def _arm(
    name: str, layers: Sequence[Layer], ranks: Sequence[Sequence[int]], coefficients: Mapping[str, int], gpu: str
) -> dict[str, Any]:
    """Of the ranks of each layer's experts; the layers that are named in ``coefficients`` have a SincUpdate."""
    means = [statistics.fmean(own) for own in ranks]
    time = 0.0
    for layer, mean in zip(layers, means, strict=True):
        costs = [layer.lora_cost(mean)]
        if layer.name in coefficients:
            costs = [layer.sinc_product_cost(), layer.sinc_passes_cost(mean)]
        time += sum(cost.milliseconds(GPUS[gpu]) for cost in costs)
    return _held(name, owned_at(layers, means, [max(own) for own in ranks], coefficients), time)


def _held(name: str, held: Held, milliseconds: float) -> dict[str, Any]:
    parts = {"A, B": held.adapters, "gradients": held.gradients, "AdamW": held.optimizer, "saved": held.saved}
    return {
        "name": name,
        "held": parts | ({"buffer": held.buffer} if held.buffer else {}),
        "milliseconds": milliseconds,
    }
