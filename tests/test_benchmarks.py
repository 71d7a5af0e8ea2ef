"""The benchmark suite: parity before speed, overheads that no drift of the machine changes, memory, one whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs peft, as the benchmarks do")

from benchmarks import dense, moe, projection, race, sinc
from benchmarks.floors import Machine, base_cost, lora_cost
from benchmarks.memory import peak_bytes
from benchmarks.providers import BUILDERS, FORWARD_BACKWARD, MODES, Oracle, Problem, Unavailable
from benchmarks.shapes import Shape
from benchmarks.timing import Spread, differences
from benchmarks.warm import all_cases
from lrlora_ops._storage import saved_bytes
from lrlora_ops.tuning.rounds import ROUNDS, interleave
from lrlora_ops.tuning.timers import Called

ROOT = Path(__file__).parents[1]
# pytest-benchmark turns itself off in a worker of pytest-xdist, and knows one by its environment.
OUTSIDE_XDIST = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
CPU = torch.device("cpu")
SHAPE = Shape("tiny", "q_proj", 33, 24, 40)
MACHINE = Machine("any", bandwidth=1e9, flops=1e9)
QUICK = dense.cases(CPU, quick=True)[0]


def build(name: str, dtype: torch.dtype, rank: int = 4, max_rank: int = 4):
    try:
        return BUILDERS[name](Problem.random(SHAPE, dtype, max_rank, CPU), rank)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "compile"])
def test_providers_agree_with_the_oracle(name, dtype):
    provider = build(name, dtype)
    Oracle(provider.problem).check(provider)


def test_compiled_provider_agrees_with_the_oracle():
    provider = build("compile", torch.float32)
    Oracle(provider.problem).check(provider)


def test_dead_components_agree_with_the_oracle():
    provider = build("lrlora", torch.float32, rank=3, max_rank=8)
    Oracle(provider.problem).check(provider)


@pytest.mark.parametrize("name", ["lrlora", "PEFT"])
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B"])
def test_parity_notices_a_wrong_component(name, leaf):
    provider = build(name, torch.bfloat16)
    with torch.no_grad():
        provider.leaves[leaf].mul_(1.1)
    with pytest.raises(AssertionError, match=r"parity: .* not timed"):
        Oracle(provider.problem).check(provider)


def test_parity_notices_a_gradient_that_is_not_finite():
    provider = build("eager", torch.float32)
    provider.problem.dy[0, 0] = torch.nan
    clean = Oracle(Problem.random(SHAPE, torch.float32, 4, CPU))
    with pytest.raises(AssertionError, match="parity: x "):
        clean.check(provider)


def test_what_fails_parity_is_not_timed(monkeypatch):
    def wrong(problem, rank):
        provider = BUILDERS["eager"](problem, rank)
        with torch.no_grad():
            provider.leaves["lora_A"].zero_()
        return provider

    def absent(problem, rank):
        raise Unavailable("not here")

    monkeypatch.setattr(dense, "BUILDERS", {**BUILDERS, "eager": wrong, "PEFT": absent})
    outcomes = race.measure(QUICK, CPU, MACHINE)
    for mode in MODES:
        assert isinstance(outcomes[mode, "eager"], AssertionError)
        assert isinstance(outcomes[mode, "PEFT"], Unavailable)
        ours = outcomes[mode, "lrlora 3/8"]
        assert isinstance(ours, race.Row)
        assert ours.overhead is not None
        assert ours.overhead_to_peft is None


def test_overhead_is_free_of_drift():
    base = [1.0, 2.0, 4.0, 8.0, 16.0]
    slower = [time + extra for time, extra in zip(base, (0.2, 0.3, 0.1, 0.4, 0.9), strict=True)]
    overhead = Spread.of(differences(slower, base))
    assert (overhead.p20, overhead.median, overhead.p80) == pytest.approx((0.18, 0.3, 0.5))


def test_a_ratio_to_noise_is_none():
    assert race.ratio(1.0, 4.0) == 0.25
    assert race.ratio(1.0, -0.1) is None
    assert race.ratio(1.0, None) is None


def test_every_round_runs_every_step():
    calls: list[str] = []
    timers = {name: Called(lambda name=name: calls.append(name)) for name in "abc"}
    samples, failed = interleave(timers, CPU, budget_s=0)
    assert not failed
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", ROUNDS["cpu"][0])
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]  # after the first calls
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1  # no step always follows the same one


def test_who_fails_in_a_round_does_not_stop_the_others():
    class Fails(Called):
        def sample(self):
            calls.append(1)
            if len(calls) > 3:
                raise ValueError("no more")
            return 1.0

    calls: list[int] = []
    samples, failed = interleave({"good": Called(lambda: None), "bad": Fails(lambda: None)}, CPU, budget_s=0)
    assert list(samples) == ["good"]
    assert len(samples["good"]) == ROUNDS["cpu"][0]
    assert str(failed["bad"]) == "no more"


def test_the_base_layer_is_profiled_beside_who_is():
    """Kernel times are compared with kernel times, and what graphs give with what graphs give."""

    class Fixed:
        def __init__(self, kind, seconds):
            self.kind, self.seconds = kind, seconds

        def sample(self):
            return self.seconds

    timers = {"base": Fixed("graph", 5.0), "ours": Fixed("graph", 6.0), "waits": Fixed("profiler", 4.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "Profiled", lambda step: Fixed("profiler", 3.0))
        samples, bases = race._sample(timers, lambda: None, CPU, 0.0)
    assert set(samples) == set(timers)
    assert (set(bases["graph"]), set(bases["profiler"])) == ({5.0}, {3.0})
    assert set(samples["waits"]) == {4.0}


def test_a_kept_error_keeps_no_tensors():
    def fails():
        kept = torch.zeros(3)
        references.append(weakref.ref(kept))
        raise ValueError("with a tensor in its frame")

    references: list[weakref.ref] = []
    try:
        fails()
    except ValueError as error:
        kept = race.released(error)
    assert isinstance(kept, ValueError)
    assert references[0]() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_memory_is_at_most_pefts(dtype):
    saved = {}
    for name in ("base", "lrlora", "PEFT"):
        provider = build(name, dtype)
        provider.step(FORWARD_BACKWARD)
        saved[name] = saved_bytes(lambda p=provider: p.layer(p.problem.x), provider.resident())
    assert saved["base"] == 0
    assert saved["lrlora"] == dtype.itemsize * SHAPE.M * (SHAPE.K + 4)  # x and u
    assert saved["lrlora"] <= saved["PEFT"]


def test_peak_memory_is_what_is_held_at_once():
    def step():
        for _ in range(3):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(1 << 19, dtype=torch.uint8)
            del first, second

    assert peak_bytes(step, CPU) == (1 << 20) + (1 << 19)


def test_floor_of_forward_alone():
    M, K, N, r = SHAPE.M, SHAPE.K, SHAPE.N, 4
    base, lora = base_cost(SHAPE, backward=False), lora_cost(SHAPE, r, backward=False)
    assert (base.bytes, base.flops) == (2 * (M * K + K * N + M * N), 2 * M * K * N)
    assert (lora.bytes, lora.flops) == (2 * (M * K + 2 * M * r + r * (K + N)), 2 * M * r * (K + N))
    assert lora_cost(SHAPE, 0).bytes == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_unique_names(device):
    ids = [case.id for case in all_cases(torch.device(device))]
    assert len(ids) == len(set(ids))


def test_the_suite_runs(tmp_path):
    """All of it, on a tiny case: the table, the JSON, and pytest-benchmark's entries made of the same rounds."""
    results, entries = tmp_path / "results.json", tmp_path / "entries.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--quick"]
    command += ["--results", str(results), "--benchmark-json", str(entries), "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=OUTSIDE_XDIST)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "overhead ms" in finished.stdout

    written = json.loads(results.read_text())
    assert {"device", "date", "commit", "versions", "machines"} < set(written)
    rows = {(row["layer"], row["mode"], row["provider"]): row for row in written["rows"]}
    quick = [QUICK, *moe.cases(CPU, quick=True), *projection.cases(CPU, quick=True), *sinc.cases(CPU, quick=True)]
    assert set(rows) == {(c.layer, mode, name) for c in quick for mode in c.modes for name in c.contenders()}
    for (*_, provider), row in rows.items():
        assert (row["overhead"] is None) == (provider == "base")
        assert row["floor_ms"] > 0
    entry_of = {
        tuple(entry["extra_info"][key] for key in ("layer", "mode", "provider")): entry for entry in _entries(entries)
    }
    for key, row in rows.items():
        assert entry_of[key]["stats"]["median"] == pytest.approx(row["time"]["median"] / 1e3)


def test_results_in_no_folder_are_refused(tmp_path):
    path = tmp_path / "missing" / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--quick", "--results", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=OUTSIDE_XDIST)
    assert finished.returncode == pytest.ExitCode.USAGE_ERROR
    assert "there is no folder" in finished.stderr


def _entries(path: Path) -> list[dict]:
    return json.loads(path.read_text())["benchmarks"]
