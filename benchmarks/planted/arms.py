"""The arms of the planted tasks: how each spends the budget, all through ``apply_lora``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.planted.cases import Case
from benchmarks.planted.networks import MAX_RANK
from lrlora_ops import Adapters, DynamicRank, FixedRank, LearnedRank, SincUpdate, apply_lora


def uniform(case: Case, steps: int) -> Adapters:
    """The budget spread evenly: the first layers get the remainder, experts the rounded mean."""
    if case.vocabulary:
        return apply_lora(case.student, FixedRank(round(case.budget / case.groups)))
    rank, extra = divmod(case.budget, case.groups)
    ranks = {name: FixedRank(rank + (i < extra)) for i, name in enumerate(case.planted)}
    return apply_lora(case.student, ranks, list(case.planted))


def oracle(case: Case, steps: int) -> Adapters:
    """The planted ranks themselves."""
    if not case.vocabulary:
        ranks = {name: FixedRank(rank) for name, (rank,) in case.planted.items()}
        return apply_lora(case.student, ranks, list(case.planted))
    adapters = apply_lora(case.student, FixedRank(0))
    for name, of_experts in case.planted.items():
        adapters.modules[name].table.set_ranks(of_experts)  # lora_B is zero: nothing was trained yet
    return adapters


def learned(case: Case, steps: int) -> Adapters:
    """The same budget, learned."""
    method = LearnedRank(case.budget / case.groups, MAX_RANK, total_steps=steps)
    return apply_lora(case.student, method, None if case.vocabulary else list(case.planted))


def dynamic(case: Case, steps: int, score: str) -> Adapters:
    """Experts grow from half of the rounded mean to all of it, in as many growths as the paper has."""
    target = round(case.budget / case.groups)
    method = DynamicRank(target // 2, target, MAX_RANK, steps, interval=steps // 19, score=score)
    return apply_lora(case.student, method)


def sinc(case: Case, steps: int) -> Adapters:
    """The budget spread evenly, and one learned function of each element for all layers."""
    return apply_lora(case.student, SincUpdate(round(case.budget / case.groups), share="global"), list(case.planted))


ARMS: dict[str, Callable[[Case, int], Adapters]] = {
    "uniform": uniform,
    "dynamic-paper": partial(dynamic, score="paper"),
    "dynamic-saliency": partial(dynamic, score="saliency"),
    "learned": learned,
    "oracle": oracle,
    "sinc": sinc,
}


def serves(arm: str, case_name: str) -> bool:
    """Whether an arm is for this case: a layer that is not divided among experts gives DynamicRank no choice, and
    SincUpdate, which chooses no rank, is for updates of one rank each."""
    if arm == "sinc":
        return case_name in ("dense-equal", "dense-elementwise")
    return not arm.startswith("dynamic") or case_name.startswith("moe")
