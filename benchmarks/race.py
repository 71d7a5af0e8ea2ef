"""One case of a benchmark: parity of every provider, then their times, taken in turn in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from benchmarks.floors import Cost, Machine
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.providers import FORWARD, FORWARD_BACKWARD, Provider
from benchmarks.timing import Spread, differences, interleave

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of the rounds of a mode on a CPU; a training step takes about twice as long as inference, and matters more.
_SECONDS = {FORWARD: 6.0, FORWARD_BACKWARD: 20.0}


class Case(Protocol):
    """What is measured: a layer of one dtype, and who competes on it.

    Attributes:
        layer: The layer by name, with its sizes.
        max_rank: The components that a group can have.
        effort: Share of the usual time to spend on it.
        modes: What is timed, of ``MODES``.
    """

    @property
    def layer(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def effort(self) -> float: ...
    @property
    def modes(self) -> tuple[str, ...]: ...
    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, live rank); "base" is the frozen layer alone."""

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """How to build a provider from (builder, live rank), and the check of its parity, which raises."""

    def work(self, rank: int, mode: str) -> Cost:
        """What has to be done: the base layer's work for rank 0, else the work of the components alone."""


@dataclass(frozen=True)
class Row:
    """One provider of a case in one mode. Times in ms; ``overhead`` is what each round took beyond the base layer.

    ``layer`` is the case by name, ``rank`` the live components per group. For the base layer, ``tflops`` and
    ``gb_per_s`` are its own; for all others the adapter's useful work, live components only, over the overhead.
    ``floor_ms`` bounds the same time from below, computed from the shapes and ``machine``. Memory in MB (1e6 bytes);
    ``peak_extra_mb`` is beyond the base layer's peak.
    """

    layer: str
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


def measure(case: Case, device: torch.device, machine: Machine) -> Outcomes:
    """Times every provider of the case that agrees with the oracle; the others' outcome is what went wrong."""
    build, check = case.prepare(device)
    providers: dict[str, Provider] = {}
    outcomes: Outcomes = {}
    for name, (builder, rank) in case.contenders().items():
        try:
            provider = build(builder, rank)
            check(provider)
        except Exception as error:
            outcomes.update({(mode, name): error for mode in case.modes})
        else:
            providers[name] = provider
    del check
    if "base" not in providers:
        raise RuntimeError(f"nothing can be measured without the base layer: {outcomes[case.modes[0], 'base']}")
    for mode in case.modes:
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
        cost = case.work(provider.rank, mode)
        time, overhead = (_milliseconds(series[name]) for series in (samples, overheads))
        spent = (time if name == "base" else overhead).median / 1e3
        rows.append(
            Row(
                *(case.layer, DTYPES[case.dtype], case.max_rank, provider.rank, mode, name),
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


def ratio(value: float, unit: float | None) -> float | None:
    """``value / unit``, or None if the unit is not there or lost in noise, below zero."""
    return value / unit if unit is not None and unit > 0 else None


def _milliseconds(seconds: list[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def _saved_mb(provider: Provider) -> float:
    provider.step(FORWARD_BACKWARD)
    return saved_bytes(lambda: provider.layer(provider.problem.x), provider.resident()) / 1e6
