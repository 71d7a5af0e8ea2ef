"""One case of a benchmark: parity of every provider, then their times, taken in turn in one run."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from benchmarks.floors import Cost, Machine
from benchmarks.memory import peak_bytes
from benchmarks.providers import FORWARD, FORWARD_BACKWARD, Provider, Unavailable
from benchmarks.timing import Spread, differences
from lrlora_ops import _storage
from lrlora_ops.tuning.rounds import interleave
from lrlora_ops.tuning.timers import Profiled, Timer, timer_for

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of the rounds of a mode; a training step takes about twice as long as inference, and matters more.
_SECONDS = {"cpu": {FORWARD: 6.0, FORWARD_BACKWARD: 20.0}, "cuda": {FORWARD: 0.3, FORWARD_BACKWARD: 1.0}}
_PROFILED_SECONDS = 1.0  # to profile takes longer than what is profiled

# The exit code of a process that can use the GPU no more, and leaves the other cases to the next one.
CONTEXT_LOST = 93


class ContextLost(Exception):
    """The process can use the GPU no more, whose memory a provider damaged, say; the first argument is its name."""


class Case(Protocol):
    """What is measured: a layer of one dtype, and who competes on it.

    Attributes:
        layer: The layer by name, with its sizes.
        max_rank: The components that a group can have.
        effort: Share of the usual time to spend on it.
        modes: What is timed, of ``MODES``.
        priority: The lowest is measured first.
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
    def priority(self) -> int: ...
    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, live rank); "base" is the frozen layer alone."""

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """How to build a provider from (builder, live rank), and the check of its parity, which raises."""

    def work(self, provider: Provider, mode: str) -> Cost:
        """What has to be done: the base layer's work, or the work of the adapter alone."""


@dataclass(frozen=True)
class Row:
    """One provider of a case in one mode. Times in ms; ``overhead`` is what each round took beyond the base layer.

    ``layer`` is the case by name, ``rank`` the live components per group. For the base layer, ``tflops`` and
    ``gb_per_s`` are its own; for all others the adapter's useful work, live components only, over the overhead.
    ``floor_ms`` bounds the same time from below, computed from the shapes and ``machine``. Memory in MB (1e6 bytes);
    ``peak_extra_mb`` is beyond the base layer's peak, ``peak_mb`` all that the layer needs, with its weights and x.
    ``timer`` is a timer's ``kind``: the profiler's times leave the gaps between kernels out, and the overhead is then
    over the base layer's time by the profiler. ``case`` is the case's id.
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
    case: str
    timer: str
    rounds: int
    peak_mb: float

    def record(self) -> dict[str, Any]:
        """All but the single samples, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "samples_s"}


Outcome = Row | Exception
Outcomes = dict[tuple[str, str], Outcome]  # (mode, provider)


def measure(
    case: Case,
    device: torch.device,
    machine: Machine,
    *,
    time_left: Callable[[], float] = lambda: math.inf,
    without: Mapping[str, str] | None = None,
) -> Outcomes:
    """Times every provider of the case that agrees with the oracle; the others' outcome is what went wrong.

    Args:
        case: What is measured.
        device: Where.
        machine: Its rates, for the floors.
        time_left: Seconds; with none left, no further peer is built.
        without: Providers that are left out, with the reason.

    Raises:
        ContextLost: A provider has made the GPU unusable for this process.
        RuntimeError: The base layer itself cannot be timed.
    """
    build, check = case.prepare(device)
    providers: dict[str, Provider] = {}
    outcomes: Outcomes = {}
    for name, (builder, rank) in case.contenders().items():
        try:
            if without and name in without:
                raise Unavailable(without[name])
            if time_left() <= 0:
                raise Unavailable("no time was left for it")
            provider = build(builder, rank)
            check(provider)
        except Exception as error:
            outcomes.update({(mode, name): released(error) for mode in case.modes})
        else:
            providers[name] = provider
        _require_context(device, name)
    del check
    if "base" not in providers:
        raise RuntimeError(f"nothing can be measured without the base layer: {outcomes[case.modes[0], 'base']}")
    for mode in case.modes:
        outcomes |= _race(case, providers, mode, device, machine)
    return outcomes


def released(error: Exception) -> Exception:
    """The error, whose traceback holds no local variables any more: they may be all of a GPU's memory."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    return error


def _require_context(device: torch.device, provider: str) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise ContextLost(provider) from error


def _race(case: Case, providers: dict[str, Provider], mode: str, device: torch.device, machine: Machine) -> Outcomes:
    timers, peaks, failed = _prepare(providers, mode, device)
    if "base" in failed:
        raise failed["base"]
    samples, bases = _sample(timers, providers["base"].step(mode), device, case.effort * _SECONDS[device.type][mode])
    for name, error in samples.items():
        if isinstance(error, Exception):
            failed[name] = released(error)
            _require_context(device, name)
    if "base" in failed:
        raise failed["base"]
    times = {name: taken for name, taken in samples.items() if not isinstance(taken, Exception)}
    overheads = {
        name: _milliseconds(differences(taken, bases[timers[name].kind]))
        for name, taken in times.items()
        if name != "base"
    }
    peft = overheads["PEFT"].median if "PEFT" in overheads else None
    outcomes: Outcomes = {(mode, name): error for name, error in failed.items()}
    for name, taken in times.items():
        provider, kind = providers[name], timers[name].kind
        cost, time, overhead = case.work(provider, mode), _milliseconds(taken), overheads.get(name)
        spent = (overhead or time).median / 1e3
        outcomes[mode, name] = Row(
            *(case.layer, DTYPES[case.dtype], case.max_rank, provider.rank, mode, name),
            samples_s=taken,
            time=time,
            overhead=overhead,
            overhead_to_base=overhead and overhead.median / _milliseconds(bases[kind]).median,
            overhead_to_peft=overhead and ratio(overhead.median, peft),
            floor_ms=cost.floor_ms(machine),
            tflops=ratio(cost.flops / 1e12, spent),
            gb_per_s=ratio(cost.bytes / 1e9, spent),
            peak_extra_mb=(peaks[name] - peaks["base"]) / 1e6,
            saved_mb=_saved_mb(provider) if mode == FORWARD_BACKWARD else None,
            case=case.id,
            timer=kind,
            rounds=len(taken),
            peak_mb=(peaks[name] + held_bytes(provider)) / 1e6,
        )
    return outcomes


def _prepare(
    providers: dict[str, Provider], mode: str, device: torch.device
) -> tuple[dict[str, Timer], dict[str, int], dict[str, Exception]]:
    """The timers and peaks of memory of those whose step runs, and what went wrong with the others."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    timers: dict[str, Timer] = {}
    peaks: dict[str, int] = {}
    failed: dict[str, Exception] = {}
    for name, provider in providers.items():
        try:
            step = provider.step(mode)
            timer = timer_for(step, device, pool)
            timers[name], peaks[name] = timer, peak_bytes(step, device)
        except Exception as error:
            failed[name] = released(error)
        _require_context(device, name)
    if "base" in timers and timers["base"].kind == "profiler":  # then no graph's time has a base layer's beside it
        timers = {name: Profiled(providers[name].step(mode)) for name in timers}
    return timers, peaks, failed


def _sample(
    timers: dict[str, Timer], base: Callable[[], object], device: torch.device, budget_s: float
) -> tuple[dict[str, list[float] | Exception], dict[str, list[float]]]:
    """Samples, or what went wrong, by provider, and the base layer's samples by the kind of timer.

    What the profiler times comes last, and the base layer once more with it.
    """
    profiled = {name: timer for name, timer in timers.items() if timer.kind == "profiler" and name != "base"}
    samples, failed = interleave({n: t for n, t in timers.items() if n not in profiled}, device, budget_s)
    bases = {timers["base"].kind: samples["base"]} if "base" in samples else {}
    if profiled and bases:
        late, late_failed = interleave({"base": Profiled(base), **profiled}, device, _PROFILED_SECONDS)
        if "base" in late_failed:
            failed |= dict.fromkeys(profiled, late_failed["base"])
        else:
            bases["profiler"] = late.pop("base")
            samples, failed = samples | late, failed | late_failed
    return {**samples, **failed}, bases


def held_bytes(provider: Provider) -> int:
    """What a provider's layer and its input hold between steps, each storage once."""
    tensors = [provider.problem.x, *provider.resident()]
    return _storage.held_bytes(tensors)


def ratio(value: float, unit: float | None) -> float | None:
    """``value / unit``, or None if the unit is not there or lost in noise, below zero."""
    return value / unit if unit is not None and unit > 0 else None


def _milliseconds(seconds: list[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def _saved_mb(provider: Provider) -> float:
    provider.step(FORWARD_BACKWARD)
    return _storage.saved_bytes(lambda: provider.layer(provider.problem.x), provider.resident()) / 1e6
