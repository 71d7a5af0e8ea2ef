"""history.jsonl: what finetune and demo record while they train, and how it is read back."""

import json

import pytest
import torch

from lrlora_ops import FixedRank, LearnedRank, SincUpdate, apply_lora
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.history import FILE, History, sensitivities, traced_layers
from lrlora_ops.finetune.runs import read_run, read_runs
from tests._cli import llama, qwen3_moe
from tests._models import IDS, Model
from tests._runs import GROWING, LEARNED, MIXED, ROWS, SEQ_LEN, STEPS, rewritten, train_run


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("learned")
    return directory, train_run(LEARNED, directory)


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    directory = tmp_path_factory.mktemp("growing")
    return directory, train_run(GROWING, directory)


@pytest.mark.parametrize("name", ["learned", "growing"])
def test_a_run_records_every_step_and_what_it_came_to(name, request):
    directory, arm = request.getfixturevalue(name)
    run = read_run(directory / FILE)
    assert [step["step"] for step in run.steps] == list(range(1, STEPS + 1))
    assert all(step["loss"] > 0 and step["seconds"] > 0 for step in run.steps)
    assert run.start["before"] == {"near text": 3.25}
    assert run.end["bits"] == arm.bits
    assert run.end["parameters"] == arm.parameters
    assert run.by_adapter(run.ranks) == {n: own.flatten().tolist() for n, own in arm.adapters.ranks().items()}
    assert run.end["routing"] == {
        text: {name: own.tolist() for name, own in of.items()} for text, of in arm.routing.items()
    }


def test_ranks_are_recorded_as_they_move(learned, growing):
    """Learned ranks move within their budget, until half of the run; experts' ranks grow."""
    first, second = (read_run(directory / FILE).snapshots for directory, _ in (learned, growing))
    assert {sum(line["ranks"]) for line in first} == {2 * 14}
    assert len({tuple(line["ranks"]) for line in first}) >= 3
    assert len({tuple(line["ranks"]) for line in first[STEPS // 2 :]}) == 1
    sums = [sum(line["ranks"]) for line in second]
    assert sums[0] == 8 and sums[-1] == 16 and sums == sorted(sums)


def test_stable_ranks_are_recorded_beside_the_ranks(tmp_path):
    """Of attention, which a SincUpdate moves: zero until the second step, for the first has rate 0."""
    arm = train_run(MIXED, tmp_path)
    run = read_run(tmp_path / FILE)
    bent = [name for name in run.num_experts if "self_attn" in name]
    assert run.adapters == {"rank": [n for n in run.num_experts if n not in bent], "stable rank": bent}
    assert run.by_adapter(run.ranks) == {name: [2 if name in bent else 3] for name in run.num_experts}
    exact = {name: module.delta_weight(torch.float64) for name, module in arm.adapters.modules.items() if name in bent}
    for line in run.snapshots:
        stable = run.by_adapter(line["stable_ranks"])
        assert {name for name, own in stable.items() if own == [None]} == set(run.adapters["rank"])
        assert all((own[0] >= 1) == (line["step"] > 1) for name, own in stable.items() if name in bent)
        if line["step"]:
            sensitivity = run.by_adapter(line["sensitivity"])
            assert {name for name, own in sensitivity.items() if own == [None]} == set(bent)
    for name, update in exact.items():
        [last] = run.by_adapter(run.stable_ranks)[name]
        values = torch.linalg.svdvals(update).square()
        assert last == pytest.approx(float(values.sum() / values[0]), rel=0.02)


def test_the_line_on_the_terminal_shows_stable_ranks_where_there_are_no_others(tmp_path):
    """And computes them where they are recorded, not at every step."""
    adapters = apply_lora(Model(), SincUpdate(3), "q_proj")
    for module in adapters.modules.values():
        torch.nn.init.normal_(module.lora_B)
    history = History(tmp_path, adapters, steps=1001)
    history.begin(name="run")
    first = min(float(rank) for rank in adapters.ranks().values())
    assert history.shown_ranks().startswith(f"stable ranks {first:.1f}/")
    for module in adapters.modules.values():
        module.stable_rank = lambda: pytest.fail("computed anew")
    assert history.shown_ranks().startswith(f"stable ranks {first:.1f}/")
    history.step = 1
    history.on_step(1.0)
    with pytest.raises(pytest.fail.Exception):
        [history.on_step(1.0) for _ in range(6)]


def test_a_long_run_records_ranks_two_hundred_times(tmp_path):
    adapters = apply_lora(Model(), FixedRank(2), "q_proj")
    history = History(tmp_path, adapters, steps=1001)
    history.begin(name="long")
    for _ in range(1001):
        history.on_backward()
        history.on_step(float("nan"))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()[1:]]
    assert all(line["loss"] is None for line in lines)  # JSON has no NaN
    recorded = [line["step"] for line in lines if "ranks" in line]
    assert recorded == [1, *range(6, 1001, 6), 1001]
    assert recorded == [line["step"] for line in lines if "sensitivity" in line]


@pytest.mark.parametrize("method", [FixedRank(3), LearnedRank(2, 4, 10, seed=3)])
@pytest.mark.parametrize("targets", ["all-linear", "experts"])
def test_sensitivity_is_what_the_loss_loses_with_the_components(method, targets):
    """For a live component <A_j, dA_j> is dL/dm_j, of experts the sum over both projections."""
    model = qwen3_moe() if targets == "experts" else llama()
    adapters = apply_lora(model, method, targets)
    for name, parameter in adapters.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if name.endswith("lora_B") else None
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = []
    for module in adapters.modules.values():
        table = module.table
        c = sum((pool.lora_A.double() * pool.lora_A.grad.double()).sum(1) for pool in module.pools().values())
        live = table.gate.detach()[: len(c)].double() * c.abs()
        for rows, rank in zip(table.components.tolist(), table.train_ranks.tolist(), strict=True):
            expected.append(live[rows[:rank]].sum())
    found = torch.tensor(sensitivities(adapters), dtype=torch.float64)
    assert found.max() > 0
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-9)  # of four digits


def test_sensitivity_of_adapters_without_components_is_zero():
    adapters = apply_lora(Model(), FixedRank(2), "q_proj")
    for module in adapters.modules.values():
        module.set_rank(0)
    adapters.compact()
    assert sensitivities(adapters) == [0.0, 0.0]


@pytest.mark.parametrize("model, targets", [(llama, "all-linear"), (qwen3_moe, "experts")])
def test_layers_are_those_of_a_step_and_random_numbers_stay(model, targets):
    adapters = apply_lora(model(), FixedRank(3), targets)
    state = torch.get_rng_state()
    layers = traced_layers(adapters, SEQ_LEN, ROWS)["layers"]
    assert torch.equal(torch.get_rng_state(), state)
    assert {layer["name"] for layer in layers} == set(adapters.modules)
    assert {layer["tokens"] for layer in layers} == {ROWS * SEQ_LEN}
    assert {layer["rows"] for layer in layers} == {ROWS * SEQ_LEN * (2 if targets == "experts" else 1)}
    assert {layer["itemsize"] for layer in layers} == {4}


def test_a_model_of_ones_own_has_no_layers_and_a_reason():
    model = llama()
    model.model.layers.append(torch.nn.Linear(32, 32))
    adapters = apply_lora(model, FixedRank(3), "all-linear")
    assert "ModuleList has no attribute `2`" in traced_layers(adapters, SEQ_LEN, ROWS)["no_layers"]


def test_a_run_that_was_cut_off_has_its_whole_lines(learned, tmp_path):
    text = (learned[0] / FILE).read_text()
    (tmp_path / FILE).write_text(text[: text.index('"step": 9') + 20])
    run = read_run(tmp_path / FILE)
    assert run.end is None
    assert [step["step"] for step in run.steps] == list(range(1, 9))


def test_a_resumed_run_goes_on_from_its_checkpoint(learned, tmp_path):
    """Steps after the checkpoint were made twice; the second time counts."""

    def resume(lines):
        ninth = [line for line in lines if line.get("step", 0) > 8]
        lines[:] = [*lines[:-3], {**lines[0], "first_step": 8}, *({**line, "loss": 7.0} for line in ninth), lines[-1]]

    run = read_run(rewritten(learned[0], tmp_path, resume) / FILE)
    assert [step["step"] for step in run.steps] == list(range(1, STEPS + 1))
    assert [step["loss"] == 7.0 for step in run.steps] == [False] * 8 + [True] * 4
    assert run.end is not None


def test_history_adds_to_a_run_that_goes_on_and_replaces_one_that_starts_anew(tmp_path):
    adapters = apply_lora(Model(), FixedRank(2), "q_proj")
    rest = {"machine": "", "tokens": 1, "before": {}}
    for first, steps in ((0, [1, 2, 3]), (2, [1, 2, 3]), (0, [1])):
        history = History(tmp_path, adapters, 4, first)
        history.begin(name="run", **rest)
        history.on_step(1.0)
        if not first:
            [history.on_step(1.0) for _ in steps[1:]]
        assert [step["step"] for step in read_run(tmp_path / FILE).steps] == steps


def test_runs_below_a_directory_are_found_once_in_the_order_of_their_start(learned, growing, tmp_path):
    started = {"a": "2026-01-02", "b": "2026-01-01"}
    for name, (directory, _) in {"a": learned, "b": growing}.items():
        target = tmp_path / "demo" / "adapters" / name
        rewritten(directory, target, lambda lines, name=name: lines[0].update(started=started[name]))
    runs = read_runs([tmp_path / "demo", tmp_path / "demo" / "adapters" / "a", growing[0]])
    assert [run.directory.name for run in runs] == ["b", "a", growing[0].name]
    assert runs[1].label == "learned"  # the only one of this name
    assert runs[0].label.startswith("growing · ") and runs[0].label.endswith("adapters/b")
    assert len({run.label for run in runs}) == 3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lines: lines[0].update(history=9), "has format version 9, and this lrlora reads 2: update lrlora_ops"),
        (lambda lines: lines[3].pop("step"), "damaged in line 4 .*: restore it, or leave this run out"),
        (lambda lines: lines.__setitem__(2, [1]), "damaged in line 3"),
        (lambda lines: lines[0]["ranks"].pop(), "damaged in line 1 .*13 ranks of 14"),
        (lambda lines: lines[0].update(stable_ranks=[1.0]), "damaged in line 1 .*1 stable ranks of 14"),
        (lambda lines: lines.pop(0), "no first line that says what ran"),
    ],
)
def test_a_history_that_cannot_be_read_says_so(learned, tmp_path, change, words):
    with pytest.raises(CommandError, match=words):
        read_run(rewritten(learned[0], tmp_path, change) / FILE)
