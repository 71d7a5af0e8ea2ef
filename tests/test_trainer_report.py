"""What the trainer's callback leaves for ``lrlora report``: the history of the run that the trainer made."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from lrlora_ops.cli import app  # noqa: E402
from lrlora_ops.finetune.history import FILE, traced_layers  # noqa: E402
from lrlora_ops.finetune.page import held_out, page_data  # noqa: E402
from lrlora_ops.finetune.runs import read_run  # noqa: E402
from lrlora_ops.integrations import _recording  # noqa: E402
from lrlora_ops.integrations.transformers import AdaptersCallback  # noqa: E402
from tests._training import STEPS, adapted, trainer  # noqa: E402

CASE = "grown experts, learned layers"


class Watched(transformers.TrainerCallback):
    """Ranks and rows of the experts after each step, and the losses that the trainer logs; it comes first."""

    def __init__(self, adapters) -> None:
        self.adapters, self.ranks, self.losses, self.held_out = adapters, [], [], []
        self.rows = {name: 0 for name, module in adapters.modules.items() if module.table.num_experts > 1}
        step = adapters.step
        adapters.step = lambda **options: (self.count(), step(**options))

    def count(self) -> None:
        for name in self.rows:
            self.rows[name] = self.rows[name] + self.adapters.modules[name].table.row_counts.double()

    def on_step_end(self, *_, **__) -> None:
        self.ranks.append([rank for own in self.adapters.ranks().values() for rank in own.flatten().tolist()])

    def on_evaluate(self, args, state, control, metrics, **_) -> None:
        self.held_out.append((state.global_step, metrics["eval_loss"]))

    def on_log(self, *_, logs, **__) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 10 steps of 3 micro-batches, with checkpoints and evaluations in its course."""
    directory = tmp_path_factory.mktemp("trainer")
    model, adapters = adapted(CASE)
    watched = Watched(adapters)
    logs = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 4}
    logs |= {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    run = trainer(model, adapters, directory, [watched], gradient_accumulation_steps=3, **logs)
    run.train()
    return directory, adapters, watched, run


def test_each_step_is_recorded(trained):
    directory, adapters, watched, _ = trained
    run = read_run(directory / FILE)
    assert [step["step"] for step in run.steps] == list(range(1, STEPS + 1))
    assert [step["loss"] for step in run.steps] == pytest.approx(watched.losses, abs=1e-4)  # logs are rounded
    assert [step["ranks"] for step in run.steps] == watched.ranks
    assert run.snapshots[0]["ranks"] != run.ranks == watched.ranks[-1]
    assert all(len(step["sensitivity"]) == len(run.ranks) for step in run.steps)
    assert any(step["sensitivity"][-1] for step in run.steps)
    assert run.label == "DynamicRank, LearnedRank" and "total_steps" in json.dumps(run.start["methods"])
    assert run.start["tokens"] == 2 * 10 * 3  # rows, columns, micro-batches
    assert run.tokens_per_second == pytest.approx(STEPS * 60 / run.seconds)
    assert run.end["parameters"] == sum(p.numel() for p in adapters.parameters())


def test_evaluations_are_recorded(trained):
    """Of before the first step, too, which no line of a history comes before."""
    directory, _, watched, _ = trained
    run = read_run(directory / FILE)
    assert [step for step, _ in watched.held_out] == [line["step"] for line in run.held_out]
    assert {0, 4, 8} <= {step for step, _ in watched.held_out}
    losses = [line["held_out"]["eval"] for line in run.held_out]
    assert losses == pytest.approx([loss for _, loss in watched.held_out], rel=1e-5) and losses[-1] < losses[0]
    assert held_out(run) == {"eval": [losses[0], losses[-1]]}


def test_shares_are_those_of_the_rows_that_the_loss_depends_on(trained):
    directory, _, watched, _ = trained
    shares = read_run(directory / FILE).end["routing"][_recording.TEXT]
    assert set(shares) == set(watched.rows) and len(shares) == 2
    for name, rows in watched.rows.items():
        assert shares[name] == pytest.approx((rows / rows.sum()).tolist()) and sum(shares[name]) == pytest.approx(1)


def test_costs_are_of_a_micro_batch(trained):
    directory, adapters, *_ = trained
    assert read_run(directory / FILE).start["layers"] == json.loads(
        json.dumps(traced_layers(adapters, 10, 2)["layers"])
    )


def test_lrlora_report_draws_it(trained, tmp_path):
    result = CliRunner().invoke(app, ["report", str(trained[0]), "--output", str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "growth.png"}
    assert len(list(tmp_path.glob("*-1-DynamicRank-LearnedRank.png"))) == 2  # layers, and experts beside routing
    [run] = page_data([read_run(trained[0] / FILE)], "H200")["runs"]
    assert [map_["kind"] for map_ in run["maps"]] == ["module", "expert"]
    assert list(run["maps"][1]["shares"]) == [_recording.TEXT]
    assert run["summary"]["ended"] and run["summary"]["bits"] == {} and "arms" in run["costs"]


def test_a_resumed_run_goes_on_in_its_history(trained, tmp_path):
    """And one that resumes elsewhere begins where it does."""
    directory, _, watched, _ = trained
    (tmp_path / FILE).write_text((directory / FILE).read_text()[:-40])  # killed as it wrote
    for output in (tmp_path, tmp_path / "other"):
        model, adapters = adapted(CASE)
        trainer(model, adapters, output, gradient_accumulation_steps=3).train(
            resume_from_checkpoint=str(directory / "checkpoint-4")
        )
    whole, rest = read_run(tmp_path / FILE), read_run(tmp_path / "other" / FILE)
    assert [step["step"] for step in whole.steps] == list(range(1, STEPS + 1)) and whole.end
    assert [step["ranks"] for step in whole.steps] == watched.ranks
    assert [line["step"] for line in whole.held_out] == [0, 4]  # the rest was not evaluated again
    assert [step["step"] for step in rest.snapshots] == list(range(4, STEPS + 1))
    assert rest.snapshots[0]["ranks"] == watched.ranks[3]
    assert rest.tokens_per_second == pytest.approx((STEPS - 4) * 60 / rest.seconds)


def short(path, case, steps, *, history=True, scale=None, first=True):
    """A run without clipping; its trainer and adapters. ``scale`` is as fp16 has it, from accelerate.

    ``first``: whether it takes its process for the first of several.
    """
    model, adapters = adapted(case)
    run = trainer(model, adapters, path, max_steps=steps, max_grad_norm=0)
    run.remove_callback(AdaptersCallback)
    run.add_callback(adapters.callback(history))
    run.is_world_process_zero = lambda: first
    if scale:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.train()
    assert run.training_step.__func__ is transformers.Trainer.training_step
    return run, adapters


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("learned")
    short(directory, "learned", 5)
    return read_run(directory / FILE).steps


def test_a_long_run_has_a_line_for_many_steps(learned, tmp_path, monkeypatch):
    """With the mean loss since the line before, and all of the time."""
    monkeypatch.setattr("lrlora_ops.finetune.history.SNAPSHOTS", 2)
    short(tmp_path, "learned", 5)
    run = read_run(tmp_path / FILE)
    first, second, third, fourth, fifth = (step["loss"] for step in learned)
    assert [step["step"] for step in run.steps] == [1, 3, 5]
    expected = [first, (second + third) / 2, (fourth + fifth) / 2]
    assert [step["loss"] for step in run.steps] == pytest.approx(expected, rel=1e-5)
    assert run.tokens_per_second == pytest.approx(5 * 20 / run.seconds)


def test_the_loss_scale_is_no_part_of_what_is_recorded(learned, tmp_path):
    """A power of two, which the statistics are divided by without an error."""
    short(tmp_path, "learned", 5, scale=2.0**10)
    recorded = [
        [(step["loss"], step["sensitivity"]) for step in own] for own in (learned, read_run(tmp_path / FILE).steps)
    ]
    assert recorded[0] == recorded[1] and any(learned[-1]["sensitivity"])


@pytest.mark.parametrize("how", [{"history": False}, {"first": False}])
def test_who_shall_not_write_does_not(tmp_path, how):
    short(tmp_path, "fixed", 1, **how)
    assert not list(tmp_path.glob("**/*.jsonl"))


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path, monkeypatch):
    """``/dev/full`` refuses every write."""
    (tmp_path / FILE).symlink_to("/dev/full")
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
    with pytest.warns(UserWarning, match=r"does not take the history .*\(No space left on device\)"):
        run, _ = short(tmp_path, "fixed", 2)
    assert run.state.global_step == 2
