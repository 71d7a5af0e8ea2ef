"""A dense layer with an adapter: the cases, and the measurement of all providers of a case in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.floors import Cost, Machine, base_cost, lora_cost
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.providers import BUILDERS, FORWARD, FORWARD_BACKWARD, MODES, Oracle, Problem, Provider
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, LONG_SHAPES, Shape
from benchmarks.timing import Spread, differences, interleave

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_DEAD = (128, (128, 64, 32, 8))
# Of the rounds of a mode on a CPU; a training step takes about twice as long as inference, and matters more.
_SECONDS = {FORWARD: 6.0, FORWARD_BACKWARD: 20.0}


@dataclass(frozen=True)
class Case:
    """One layer, dtype and adapter of ``max_rank`` components, with as many alive as ``live`` says, one by one.

    ``effort`` is the share of the usual time to spend on it.
    """

    shape: Shape
    dtype: torch.dtype
    max_rank: int
    live: tuple[int, ...]
    peers: tuple[str, ...]
    effort: float = 1.0

    def __str__(self) -> str:
        return f"{self.shape} {DTYPES[self.dtype]} r{self.max_rank}"

    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""
        return str(self).replace(" ", "-") + ("-dead" if len(self.live) > 1 else "")

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, live rank). Only this library can leave dead components out."""
        own = {f"lrlora {live}/{self.max_rank}": ("lrlora", live) for live in self.live}
        if len(own) == 1:
            own = {"lrlora": ("lrlora", self.live[0])}
        return {"base": ("base", 0), **own, **{peer: (peer, self.max_rank) for peer in self.peers}}


@dataclass(frozen=True)
class Row:
    """One provider in one mode. Times in ms; ``overhead`` is what each round took beyond the base layer.

    For the base layer, ``tflops`` and ``gb_per_s`` are its own; for all others the adapter's useful work, live
    components only, over the overhead. ``floor_ms`` bounds the same time from below, computed from the shapes and
    ``machine``. Memory in MB (1e6 bytes); ``peak_extra_mb`` is beyond the base layer's peak.
    """

    shape: Shape
    dtype: str
    max_rank: int
    rank: int
    mode: str
    provider: str
    samples_s: list[float]
    time: Spread
    overhead: Spread | None
    overhead_to_base: float | None
    overhead_to_peft: float | None
    floor_ms: float
    tflops: float | None
    gb_per_s: float | None
    peak_extra_mb: float
    saved_mb: float | None

    def record(self) -> dict[str, Any]:
        """All but the single samples, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "samples_s"}


Outcome = Row | Exception
Outcomes = dict[tuple[str, str], Outcome]  # (mode, provider)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """All cases for a device, the main ones first; or a tiny one that shows that the suite runs."""
    if quick:
        return [Case(Shape("tiny", "q_proj", 64, 96, 80), torch.float32, 8, (8, 3), ("PEFT", "eager"), effort=0.05)]
    if device.type == "cuda":
        peers: tuple[str, ...] = ("PEFT", "eager", "addmm", "compile")
        first = LONG_SHAPES[0]
        others = [shape for shape in GPU_SHAPES if shape.model != "8B" and shape.projection in ("q_proj", "down_proj")]
        sizes = [(shape, rank) for shape in LONG_SHAPES for rank in (16, 128)]
        sizes += [(shape, 16) for shape in others] + [(first, 4), (first, 64)]
        selected = [Case(shape, torch.bfloat16, rank, (rank,), peers) for shape, rank in sizes]
        return [*selected, Case(first, torch.bfloat16, *_DEAD, ("PEFT",))]
    peers = ("PEFT", "eager", "compile")
    sizes = [(shape, 16) for shape in CPU_SHAPES] + [(CPU_SHAPES[0], 4), (CPU_SHAPES[0], 64)]
    selected = [Case(shape, torch.float32, rank, (rank,), peers) for shape, rank in sizes]
    # Without matrix instructions for bf16 its base product takes several times longer.
    selected += [Case(replace(shape, M=shape.M // 4), torch.bfloat16, rank, (rank,), peers) for shape, rank in sizes]
    return [*selected, Case(CPU_SHAPES[0], torch.float32, *_DEAD, ("PEFT",))]


def measure(case: Case, device: torch.device, machine: Machine) -> Outcomes:
    """Times every provider of the case that agrees with the oracle; the others' outcome is what went wrong."""
    problem = Problem.random(case.shape, case.dtype, case.max_rank, device)
    oracle = Oracle(problem)
    providers: dict[str, Provider] = {}
    outcomes: Outcomes = {}
    for name, (builder, rank) in case.contenders().items():
        try:
            provider = BUILDERS[builder](problem, rank)
            oracle.check(provider)
        except Exception as error:
            outcomes.update({(mode, name): error for mode in MODES})
        else:
            providers[name] = provider
    del oracle
    if "base" not in providers:
        raise RuntimeError(f"nothing can be measured without the base layer: {outcomes[MODES[0], 'base']}")
    for mode in MODES:
        outcomes |= {(mode, row.provider): row for row in _race(case, providers, mode, device, machine)}
    return outcomes


def _race(case: Case, providers: dict[str, Provider], mode: str, device: torch.device, machine: Machine) -> list[Row]:
    steps = {name: provider.step(mode) for name, provider in providers.items()}
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    samples = interleave(steps, device, case.effort * _SECONDS[mode])
    overheads = {name: differences(times, samples["base"]) for name, times in samples.items()}
    peft = Spread.of(overheads["PEFT"]).median if "PEFT" in overheads else None
    rows = []
    for name, provider in providers.items():
        cost = work(case, provider.rank, mode)
        time, overhead = (_milliseconds(series[name]) for series in (samples, overheads))
        spent = (time if name == "base" else overhead).median / 1e3
        rows.append(
            Row(
                *(case.shape, DTYPES[case.dtype], case.max_rank, provider.rank, mode, name),
                samples_s=samples[name],
                time=time,
                overhead=None if name == "base" else overhead,
                overhead_to_base=None if name == "base" else overhead.median / _milliseconds(samples["base"]).median,
                overhead_to_peft=ratio(overhead.median / 1e3, peft) if name != "base" else None,
                floor_ms=cost.floor_ms(machine),
                tflops=ratio(cost.flops / 1e12, spent),
                gb_per_s=ratio(cost.bytes / 1e9, spent),
                peak_extra_mb=(peaks[name] - peaks["base"]) / 1e6,
                saved_mb=_saved_mb(provider) if mode == FORWARD_BACKWARD else None,
            )
        )
    return rows


def work(case: Case, rank: int, mode: str) -> Cost:
    """What has to be done: the base layer's work for rank 0, else the work of ``rank`` components alone."""
    size, backward = case.dtype.itemsize, mode == FORWARD_BACKWARD
    if rank == 0:
        return base_cost(case.shape, size, backward=backward)
    return lora_cost(case.shape, rank, size, size, backward=backward)


def ratio(value: float, unit: float | None) -> float | None:
    """``value / unit``, or None if the unit is not there or lost in noise, below zero."""
    return value / unit if unit is not None and unit > 0 else None


def _milliseconds(seconds: list[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def _saved_mb(provider: Provider) -> float:
    provider.step(FORWARD_BACKWARD)
    forward: Callable[[], object] = lambda: provider.layer(provider.problem.x)  # noqa: E731
    return saved_bytes(forward, provider.resident()) / 1e6
