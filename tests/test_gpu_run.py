"""``make gpu`` without a GPU: its order of work, what is kept when it is stopped, goals, generated tables, timers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="needs peft, as the benchmarks do")

from benchmarks import docs, gpu, race, report, results_file, scale
from benchmarks.dense import cases as dense_cases
from benchmarks.floors import Machine
from benchmarks.goals import goals
from benchmarks.moe import Case
from benchmarks.providers import FORWARD_BACKWARD, Unavailable
from benchmarks.results_file import Results
from benchmarks.shapes import LONG_SHAPES, olmoe
from lrlora_ops.tuning import timers
from tests.test_benchmarks import CPU, MACHINE, QUICK

CUDA = torch.device("cuda")
ABOUT = {"device": "NVIDIA H200", "commit": "c", "machines": [{"name": "bf16", "bandwidth": 4.3e12, "flops": 790e12}]}


class TestParity:
    def read(self, *lines: str) -> gpu.Parity:
        parity = gpu.Parity()
        for line in lines:
            parity.read(line)
        return parity

    def test_one_process(self):
        parity = self.read(
            "collected 94 items / 90 deselected / 4 selected",
            "tests/test_a.py::test_x[OLMoE up, Zipf] PASSED                            [ 25%]",
            "tests/test_a.py::test_x[b] FAILED [ 50%]",
            "tests/test_b.py::test_y SKIPPED (no GPU: needs one) [ 75%]",
            "FAILED tests/test_a.py::test_x[b] - assert 1",
        )
        record = parity.record(12.4)
        assert record == {
            "passed": 1,
            "failed": ["tests/test_a.py::test_x[b]"],
            "skipped": ["tests/test_b.py::test_y"],
            "not_run": 1,
            "seconds": 12,
        }

    def test_several_processes(self):
        parity = self.read(
            "created: 8/8 workers",
            "8 workers [3 items]",
            "tests/test_a.py::test_x[OLMoE up, Zipf] ",
            "[gw3] [ 33%] PASSED tests/test_a.py::test_x[OLMoE up, Zipf] ",
            "[gw0] [ 66%] ERROR tests/test_a.py::test_z ",
        )
        record = parity.record(0)
        assert (record["passed"], record["failed"], record["not_run"]) == (1, ["tests/test_a.py::test_z"], 1)


def test_a_command_that_overruns_is_stopped_with_its_lines_kept():
    lines: list[str] = []
    began = time.monotonic()
    program = "import time; print('first', flush=True); time.sleep(60)"
    assert gpu.run([sys.executable, "-c", program], 3, lines.append) == -1
    assert time.monotonic() - began < 20
    assert lines == ["first"]
    assert gpu.run([sys.executable, "-c", "print(1); raise SystemExit(3)"], 30, lines.append) == 3
    assert lines == ["first", "1"]


def test_a_file_that_cannot_be_imported_stops_nothing_else(monkeypatch, tmp_path):
    """Its error is a failure, as pytest prints it, and the tests of the other files run."""

    def run(command, seconds, read):
        assert "--continue-on-collection-errors" in command
        assert "tests/test_primitives_gpu.py" in command
        for line in (
            "collected 3 items / 1 error",
            "tests/test_a.py::test_x PASSED [ 50%]",
            "ERROR tests/test_b.py - x",
        ):
            read(line)
        return 1

    monkeypatch.setattr(gpu, "run", run)
    this = gpu.Run(tmp_path / "r.json", 5.0, [], 1)
    this.parity()
    parity = Results(tmp_path / "r.json", resume=True).content["parity"]
    assert (parity["passed"], parity["exit_code"]) == (1, 1)


def test_what_a_run_needs_is_named_before_it_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "_NEEDED", ("pytest", "no_such_module"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "-m pip install no-such-module" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_suite_goes_on_after_a_lost_context(monkeypatch, tmp_path):
    codes, commands = [race.CONTEXT_LOST, race.CONTEXT_LOST, 1], []

    def run(command, seconds, read):
        commands.append(command)
        return codes.pop(0)

    monkeypatch.setattr(gpu, "run", run)
    this = gpu.Run(tmp_path / "r.json", 5.0, ["--quick"], 1)
    this.benchmarks()
    assert not codes
    for command in commands:
        assert command[command.index("--results") + 1] == str(tmp_path / "r.json")
        assert {"--resume", "--quick"} < set(command)
        assert 4 < float(command[command.index("--minutes") + 1]) < 5
    this.seconds = 0
    codes.append(0)
    this.benchmarks()
    assert codes == [0], "there was no time left"


def test_who_takes_the_gpu_away_is_named(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: lost())
    with pytest.raises(race.ContextLost) as caught:
        race._require_context(CUDA, "PEFT")
    assert caught.value.args == ("PEFT",)
    assert "illegal memory access" in str(caught.value.__cause__)


def test_blamed_providers_and_late_ones_are_left_out():
    outcomes = race.measure(QUICK, CPU, MACHINE, without={"PEFT": "it made the GPU unusable"})
    assert str(outcomes[FORWARD_BACKWARD, "PEFT"]) == "it made the GPU unusable"
    assert isinstance(outcomes[FORWARD_BACKWARD, "eager"], race.Row)
    left = iter([1.0, 1.0] + [0.0] * 10)
    outcomes = race.measure(QUICK, CPU, MACHINE, time_left=lambda: next(left))
    assert isinstance(outcomes[FORWARD_BACKWARD, "lrlora 8/8"], race.Row)
    assert str(outcomes[FORWARD_BACKWARD, "PEFT"]) == "no time was left for it"


def test_results_are_on_disk_after_every_case(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path)
    failed = {("forward", "a"): ValueError("wrong\n  by far"), ("forward", "b"): Unavailable("not here")}
    results.add("one", "layer", failed, ABOUT)
    results.blame("two", "c", "it made the GPU unusable", ABOUT)
    again = Results(path, resume=True)
    assert again.content == results.content
    assert again.content["done"] == ["one"]
    assert again.content["blamed"] == {"two": {"c": "it made the GPU unusable"}}
    reasons = {entry["provider"]: (entry["kind"], entry["reason"]) for entry in again.content["left_out"]}
    assert reasons == {"a": ("failed", "ValueError: wrong by far"), "b": ("not here", "not here")}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert Results(path).content["rows"] == []


def row(case: str, provider: str, time: float, overhead: float | None = None, peak: float = 0.0) -> dict:
    spread = {"median": time, "p20": time, "p80": time}
    own = None if overhead is None else {"median": overhead, "p20": overhead, "p80": overhead}
    return {
        "case": case,
        "provider": provider,
        "mode": FORWARD_BACKWARD,
        "time": spread,
        "overhead": own,
        "peak_mb": peak,
    }


def verdicts(rows: list[dict], **about) -> dict[str, tuple[float | None, str]]:
    return {goal.text: (goal.measured, goal.verdict) for goal in goals({**ABOUT, **about, "rows": rows})}


def test_goals_are_computed_from_the_rows():
    dense = next(c for c in dense_cases(CUDA) if (c.shape, c.max_rank) == (LONG_SHAPES[0], 16)).id
    experts, zipf = (Case(olmoe(8192), torch.bfloat16, "uniform", (), routing=r).id for r in ("random", "zipf"))
    rows = [
        row(dense, "lrlora", 0.8, 0.1),
        row(dense, "PEFT", 1.0, 0.25),
        row(dense, "LoRAFusion", 0.9, 0.15),
        row(experts, "lrlora", 2.5, 0.4),
        row(experts, "split grouped_mm", 3.9, 1.8),
        row(experts, "axolotl", 2.4, 0.3),
        row(zipf, "lrlora", 2.7, 0.5),
    ]
    found = verdicts(rows)
    size = "dense 8192x4096x4096"
    assert found[f"{size}: 1.5 times what accumulating in the base product moves"] == (0.1, "met")  # 1.5 * 0.0786
    assert found[f"{size}: PEFT's overhead over ours"] == (2.5, "NOT met")
    assert found[f"{size}: LoRAFusion's overhead over ours"] == (pytest.approx(1.5), "met")
    assert found["OLMoE 8192: overhead"] == (0.4, "met")
    assert found["OLMoE 8192: overhead of split grouped_mm over ours"] == (pytest.approx(4.5), "met")
    assert found["OLMoE 8192: PEFT's overhead over ours"] == (None, "not measured")
    assert found["OLMoE 8192: whole layer, axolotl's scattermoe_lora over ours"] == (pytest.approx(0.96), "NOT met")
    name = "OLMoE 8192, Zipf routing: overhead over that of uniform ranks and routing"
    assert found[name] == (pytest.approx(1.25), "met")
    assert verdicts(rows, device="NVIDIA A100") == {}
    negative = [row(experts, "lrlora", 2.5, -0.1), row(experts, "PEFT", 3.0, 1.0)]
    assert verdicts(negative)["OLMoE 8192: PEFT's overhead over ours"] == (None, "not measured")


def test_goals_name_cases_that_are_measured():
    """Every goal has rows once the whole suite has run."""
    from benchmarks.warm import all_cases

    rows = []
    for case in all_cases(CUDA):
        names = [name for name in case.contenders() if name != "base"]
        rows += [row(case.id, name, 1.0, 0.5, 1.0) for name in names]
    found = verdicts(rows)
    assert len(found) == 3 * 4 + 4 * 2 + 2 + 3
    assert all(measured is not None for measured, _ in found.values()), found


def test_what_a_goal_needs_is_measured_first():
    from benchmarks.warm import all_cases

    priorities = [case.priority for case in all_cases(CUDA)]
    assert priorities == sorted(priorities)
    rows = [row(c.id, n, 1.0, 0.5) for c in all_cases(CUDA) if c.priority == 0 for n in c.contenders() if n != "base"]
    assert all(measured is not None for measured, _ in verdicts(rows).values())


@pytest.mark.parametrize("page", docs.PAGES)
def test_pages_have_the_tables_of_the_files(page):
    text = (docs.FOLDER / page).read_text()
    assert docs.render(text) == text, "run python -m benchmarks.docs"
    assert docs.render(text.replace("| own |", "| my |").replace("| clock |", "| watch |")) == text


def test_a_results_file_of_a_gpu_is_rendered(monkeypatch, tmp_path):
    """Goals, parity and who was left out, from the content of a file alone."""
    quick = race.measure(QUICK, CPU, MACHINE, without={"PEFT": "set LRLORA_X to a checkout"})
    results = Results(tmp_path / "nvidia-h200.json")
    machine = Machine("bf16", 4.3e12, 790e12)
    about = {**report.environment(CPU, [machine]), "device": "NVIDIA H200"}
    results.content["parity"] = {"passed": 7, "failed": ["tests/a.py::b"], "not_run": 2}
    results.add(QUICK.id, QUICK.layer, quick, about)
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    page = docs.results()
    assert "### nvidia-h200" in page
    assert "7 passed, failed: tests/a.py::b, 2 not run" in page
    assert "| OLMoE 8192: overhead | <= 0.45 ms |  | not measured |" in page
    assert "PEFT: set LRLORA_X to a checkout (1 case," in page
    assert page.count("| lrlora 8/8 |") == 2
    assert "Not timed:" in report.text(results.content)


def test_scale_by_hand():
    """Two layers of four experts, hidden 10, intermediate 3: 29 parameters a component."""
    model = scale.Model("tiny", 2, 4, 10, 3, expert_parallel=2)
    assert model.parameters(5) == 2 * 4 * 5 * 29 == 1160
    share = scale.fsdp(model, 5, 4)
    assert (share.parameters, share.gradients, share.optimizer) == (1160, 1160, 2320)
    assert share.gathered == 2 * 4 * 1160 * 3 / 4
    assert share.reduced == 4 * 1160 * 3 / 4
    assert share.statistics == 2 * 4 * 2 * 4 * (2 * 5 + 2) * 3 / 4
    share = scale.expert_parallel(model, 5, 8)  # four replicas of two GPUs
    assert (share.parameters, share.gathered) == (4 * 580, 0)
    assert share.reduced == 2 * 4 * 580 * 3 / 4
    assert share.statistics == 2 * 4 * 2 * 2 * 12 * 3 / 4
    alone = scale.expert_parallel(model, 5, 1)
    assert (alone.held, alone.sent) == (16 * 1160, 0)


def test_scale_of_the_tables():
    """Qwen3-235B-A22B at rank 16: 94 * 128 * 16 components of 2 * 4096 + 3 * 1536 parameters."""
    model = scale.MODELS[0]
    assert model.parameters(16) == 94 * 128 * 16 * 12800
    for share_of in scale.SCHEMES.values():
        own, padded = (share_of(model, rank, 512) for rank in (16, 64))
        assert padded.held == pytest.approx(4 * own.held)
        assert own.held > 0


def test_a_step_that_waits_is_profiled(monkeypatch):
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        raise RuntimeError("called a synchronizing CUDA operation")

    def wrong():
        raise RuntimeError("shapes do not fit")

    assert timers.waits_for_gpu(waits)
    assert not timers.waits_for_gpu(lambda: None)
    with pytest.raises(RuntimeError, match="shapes"):
        timers.waits_for_gpu(wrong)
    assert modes == ["error", 0] * 3
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timers, "waits_for_gpu", lambda step: True)
    timer = timers.timer_for(lambda: calls.append(1), CUDA, (0, 0))
    assert timer.kind == "profiler"
    assert len(calls) == 3


def test_time_on_the_device_counts_each_kernel_once():
    gpu_type, cpu_type = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(device_type, time, annotation=False):
        return SimpleNamespace(device_type=device_type, self_device_time_total=time, is_user_annotation=annotation)

    events = [event(gpu_type, 3.0), event(gpu_type, 4.0), event(cpu_type, 7.0), event(gpu_type, 7.0, annotation=True)]
    assert timers.device_microseconds(events) == 7.0
    with pytest.raises(RuntimeError, match="nothing run"):
        timers.device_microseconds(events[2:])


def test_the_makefile_runs_it():
    recipe = (Path(gpu.ROOT) / "Makefile").read_text().split("\ngpu:")[1].split("\n\n")[0]
    assert "-m benchmarks.gpu $(ARGS)" in recipe
