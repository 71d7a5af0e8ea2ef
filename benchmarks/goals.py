"""What the kernels are to reach on an H200, and whether a results file shows it: computed from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import dense, moe, projection, sinc
from benchmarks.floors import Machine, accumulating_cost, sinc_passes_cost
from benchmarks.providers import FORWARD_BACKWARD
from benchmarks.shapes import LONG_SHAPES, ExpertsShape, olmoe, qwen3

OURS = "lrlora"
_DEVICE = "H200"


@dataclass(frozen=True)
class Goal:
    """``measured`` is to be at most ``limit``, or at least where ``at_least``; None if a row is missing."""

    text: str
    limit: float
    measured: float | None
    unit: str
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured >= self.limit if self.at_least else self.measured <= self.limit) else "NOT met"


class Rows:
    """The rows of a results file by case and provider, forward and backward."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.found = {
            (row["case"], row["provider"]): row
            for row in content["rows"]
            if "case" in row and row["mode"] == FORWARD_BACKWARD
        }
        self.machines = {m["name"]: Machine(**m) for m in content["machines"]}

    def overhead(self, case: str, provider: str) -> float | None:
        """Median in ms."""
        row = self.found.get((case, provider))
        return row and row["overhead"] and row["overhead"]["median"]

    def time(self, case: str, provider: str) -> float | None:
        """Median in ms, the base layer included."""
        row = self.found.get((case, provider))
        return row and row["time"]["median"]

    def peak(self, case: str, provider: str) -> float | None:
        """All that the layer needs in MB, with its weights and its input."""
        row = self.found.get((case, provider))
        return row and row["peak_mb"]


def quotient(value: float | None, unit: float | None) -> float | None:
    """None where one is missing, or lost in noise: not above zero."""
    if value is None or unit is None or unit <= 0:
        return None
    return value / unit


def goals(content: dict[str, Any]) -> list[Goal]:
    """The goals with what was measured; none for another GPU, or for a file without the rows' ids."""
    rows = Rows(content)
    if _DEVICE not in content["device"] or not rows.found:
        return []
    return [*_dense(rows), *_experts(rows), *_peft_case(rows), *_skew(rows), *_sinc(rows)]


def _dense(rows: Rows) -> Iterator[Goal]:
    for shape in LONG_SHAPES:
        case = next(case for case in dense.cases(torch.device("cuda")) if (case.shape, case.max_rank) == (shape, 16))
        ours, size = rows.overhead(case.id, OURS), f"{shape.M}x{shape.K}x{shape.N}"
        if machine := rows.machines.get("bf16"):
            limit = 1.5 * accumulating_cost(shape, 16).floor_ms(machine)
            yield Goal(f"dense {size}: 1.5 times what accumulating in the base product moves", limit, ours, "ms")
        ratio = quotient(rows.overhead(case.id, "PEFT"), ours)
        yield Goal(f"dense {size}: PEFT's overhead over ours", 3, ratio, "x", at_least=True)
        ratio = quotient(rows.overhead(case.id, "LoRAFusion"), ours)
        yield Goal(f"dense {size}: LoRAFusion's overhead over ours", 1, ratio, "x", at_least=True)


def _case(shape: ExpertsShape, ranks: str = "uniform", routing: str = "random") -> str:
    return moe.Case(shape, torch.bfloat16, ranks, (), routing=routing).id


def _experts(rows: Rows) -> Iterator[Goal]:
    for make in (olmoe, qwen3):
        shape = make(8192)
        case, name = _case(shape), f"{shape.model} {shape.T}"
        ours = rows.overhead(case, OURS)
        yield Goal(f"{name}: overhead", 0.45, ours, "ms")
        ratio = quotient(rows.overhead(case, "split grouped_mm"), ours)
        yield Goal(f"{name}: overhead of split grouped_mm over ours", 4, ratio, "x", at_least=True)
        ratio = quotient(rows.overhead(case, "PEFT"), ours)
        yield Goal(f"{name}: PEFT's overhead over ours", 5, ratio, "x", at_least=True)
        ratio = quotient(rows.time(case, "axolotl"), rows.time(case, OURS))
        yield Goal(f"{name}: whole layer, axolotl's scattermoe_lora over ours", 1, ratio, "x", at_least=True)


def _peft_case(rows: Rows) -> Iterator[Goal]:
    """The figures of PEFT's pull request 3577, measured there on an H100."""
    case = projection.PEFT_CASE.id
    yield Goal("one projection of 128 experts (PEFT 2.56 ms on an H100)", 2.56, rows.time(case, OURS), "ms")
    yield Goal("one projection of 128 experts (PEFT 1.30 GB): peak", 1300, rows.peak(case, OURS), "MB")


def _skew(rows: Rows) -> Iterator[Goal]:
    shape = olmoe(8192)
    uniform = rows.overhead(_case(shape), OURS)
    for name, limit, case in (
        ("ranks of 4 and 64", 1.15, _case(shape, ranks="bimodal")),
        ("Zipf routing", 1.3, _case(shape, routing="zipf")),
        ("one hot expert", 1.3, _case(shape, routing="hot")),
    ):
        ratio = quotient(rows.overhead(case, OURS), uniform)
        yield Goal(f"OLMoE 8192, {name}: overhead over that of uniform ranks and routing", limit, ratio, "x")


def _sinc(rows: Rows) -> Iterator[Goal]:
    """A third product beside the frozen layer's two, and the passes over the weight at the bandwidth."""
    for case in sinc.cases(torch.device("cuda")):
        base, machine = rows.time(case.id, "base"), rows.machines.get("bf16")
        if base and machine:
            limit = 1.6 * base + sinc_passes_cost(case.shape, case.max_rank).floor_ms(machine)
            yield Goal(f"{case.layer}: 1.6 times the base layer, and its passes", limit, rows.time(case.id, OURS), "ms")


def table(content: dict[str, Any]) -> list[list[str]]:
    """Cells for people, the first row the heading; empty where there are no goals."""
    found = goals(content)
    if not found:
        return []
    return [
        ["goal (forward and backward)", "limit", "measured", ""],
        *(
            [
                goal.text,
                f"{'>=' if goal.at_least else '<='} {goal.limit:.3g} {goal.unit}",
                "" if goal.measured is None else f"{goal.measured:.3g} {goal.unit}",
                goal.verdict,
            ]
            for goal in found
        ),
    ]
