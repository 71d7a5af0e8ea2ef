"""What the ranks of a run cost, and what LoRA padded to the largest of them would: computed, by ``lrlora_ops.plan``."""

from __future__ import annotations

import statistics
from typing import Any

from lrlora_ops.finetune.gpus import GPUS
from lrlora_ops.finetune.runs import Run
from lrlora_ops.plan import Held, Layer, learning, owned_at, peft


def run_costs(run: Run, gpu: str) -> dict[str, Any]:
    """Bytes held in a training step, and floors of its time on a GPU, for the last ranks of the run.

    Args:
        run: Its layers have the sizes.
        gpu: A key of ``GPUS``.

    Returns:
        ``{"gpu": ..., "arms": [...], "frozen": ms}``, or ``{"reason": ...}`` if the run does not have the sizes, or has
        updates that are no LoRA.
    """
    layers = run.layers
    if run.adapters["stable rank"]:
        return {
            "reason": "What a SincUpdate costs is not computed: it makes whole weights in place of low-rank products."
        }
    if not layers:
        reason = run.start.get("no_layers", "the history does not have them")
        return {"reason": f"The sizes of this model's layers are not known: {reason}"}
    by_layer = run.by_adapter(run.ranks)
    ranks = [by_layer[layer.name] for layer in layers]
    means, largest = [statistics.fmean(own) for own in ranks], [max(own) for own in ranks]
    mean, most = statistics.fmean(run.ranks), max(run.ranks)
    arms = [_arm("these ranks", owned_at(layers, means, largest), _time(layers, means, gpu))]
    for rank, which in {most: "the largest of them", run.max_rank: "the method's maximum"}.items():
        uniform = [float(rank)] * len(layers)
        name = f"padded to {which}, {rank}"
        arms.append(_arm(name, learning(layers, rank, rank), _time(layers, uniform, gpu)))
    theirs = sum(layer.peft_cost(mean).milliseconds(GPUS[gpu]) for layer in layers)
    arms.append(_arm(f"PEFT at the mean rank, {mean:.3g}", peft(layers, mean, most), theirs))
    frozen = sum(layer.base_cost().milliseconds(GPUS[gpu]) for layer in layers)
    return {"gpu": gpu, "arms": arms, "frozen": frozen, "tokens": max(layer.tokens for layer in layers)}


def _time(layers: list[Layer], ranks: list[float], gpu: str) -> float:
    return sum(x.lora_cost(rank).milliseconds(GPUS[gpu]) for x, rank in zip(layers, ranks, strict=True))


def _arm(name: str, held: Held, milliseconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "held": {"A, B": held.adapters, "gradients": held.gradients, "AdamW": held.optimizer, "saved": held.saved},
        "milliseconds": milliseconds,
    }
