"""The suite on shapes of one's own: what ``lrlora bench MODEL`` runs. It needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks import dense, moe, report
from benchmarks.race import Case, ContextLost
from benchmarks.results_file import Results
from benchmarks.session import Bench
from benchmarks.shapes import ExpertsShape, Shape
from lrlora_ops.plan import Layer

__all__ = ["ContextLost", "case_of", "parse_experts", "parse_shape", "run", "shape_of"]
OWN = "own"  # in the place of a model's name
# Who takes part, by the kind of device; who is not installed is in the report with what to install.
_DENSE = {"cuda": ("PEFT", "PEFT, accelerated", "eager", "addmm", "compile", "LoRAFusion")}
_DENSE["cpu"] = ("PEFT", "PEFT, accelerated", "eager", "compile")
_EXPERTS = {"cuda": ("PEFT", "PEFT, accelerated", "split grouped_mm", "compile", "axolotl", "ScatterMoE", "Liger")}
_EXPERTS["cpu"] = ("PEFT", "PEFT, accelerated", "base, eager")


def parse_shape(text: str) -> Shape:
    """``M,K,N``: rows, inputs and outputs of a linear layer.

    Raises:
        ValueError: It is none; the message says what it must be.
    """
    return Shape(OWN, "linear", *_numbers("--shape", text, "M,K,N: rows, inputs and outputs of a linear layer"))


def parse_experts(text: str) -> ExpertsShape:
    """``T,E,k,hidden,intermediate``: the experts of a layer.

    Raises:
        ValueError: It is none; the message says what it must be.
    """
    wanted = "T,E,k,hidden,intermediate: tokens, experts, experts of a token, and the widths of gated experts"
    shape = ExpertsShape(OWN, *_numbers("--experts", text, wanted))
    if shape.top_k > shape.num_experts:
        raise ValueError(f"--experts {text}: {shape.top_k} experts of a token are more than {shape.num_experts}")
    return shape


def _numbers(option: str, text: str, wanted: str) -> list[int]:
    names = wanted.partition(":")[0].split(",")
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or min(numbers) < 1:
        raise ValueError(f"{option} is {text!r}; it must be {wanted}, all above 0")
    return numbers


def shape_of(model: str, layer: Layer) -> Shape | ExpertsShape:
    """A layer of a model as the suite wants it.

    Raises:
        ValueError: Its experts have no gate, which the suite's have.
    """
    (inputs, outputs), *second = layer.projections
    if not second:
        return Shape(model, layer.name.rpartition(".")[2], layer.tokens, inputs, outputs)
    if outputs != 2 * second[0][0]:
        raise ValueError(f"{layer.name}: its experts have no gate, and the benchmarks' have")
    return ExpertsShape(model, layer.tokens, layer.num_experts, layer.rows // layer.tokens, inputs, second[0][0])


def case_of(shape: Shape | ExpertsShape, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The shape with everybody who may take part on the device."""
    if isinstance(shape, ExpertsShape):
        return moe.Case(shape, dtype, "uniform", _EXPERTS[device.type], rank=rank)
    return dense.Case(shape, dtype, rank, (rank,), _DENSE[device.type])


def run(cases: Iterable[Case], device: torch.device, write_line: Callable[[str], object]) -> str:
    """Measure the cases, a line after each; returns the tables.

    Raises:
        ContextLost: A provider has made the GPU unusable for this process.
    """
    bench = Bench(Results(), None, write_line, device)
    for case in cases:
        bench.outcomes(case)
    return report.text(bench.results.content, with_goals=False)
