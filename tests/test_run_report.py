"""lrlora report: its numbers against the adapters, its page, its pictures, what it refuses. The page in a browser is in
tests/test_report_page.py."""

import json
import re

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from lrlora_ops._checkpoint import STATE_FILE
from lrlora_ops.cli import app
from lrlora_ops.finetune.gpus import GPUS
from lrlora_ops.finetune.page import losses, page_data, render, smoothed, thinned
from lrlora_ops.finetune.pictures import draw_run, draw_runs
from lrlora_ops.finetune.run_costs import run_costs
from lrlora_ops.finetune.runs import Run, read_runs
from lrlora_ops.plan import Layer, owned, peft, sinc
from tests._cli import assert_one_line
from tests._runs import GROWING, LEARNED, MIXED, STEPS, rewritten, train_run


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A directory as the demo leaves it: two runs below ``adapters``."""
    directory = tmp_path_factory.mktemp("demo")
    for plan in (LEARNED, GROWING):
        train_run(plan, directory / "adapters" / plan.name)
    return directory


@pytest.fixture(scope="module")
def runs(output):
    return read_runs([output])


def saved_ranks(run):
    """Ranks by adapter, from what ``Adapters.save`` wrote."""
    state = json.loads((run.directory / STATE_FILE).read_text())
    tensors = load_file(run.directory / state["tensors"])
    return {name: tensors[f"{name}.table.ranks"].tolist() for name in state["modules"]}


def test_every_cell_shows_the_rank_that_the_adapters_have(runs):
    learned, growing = page_data(runs, "H200")["runs"]
    [cells] = learned["maps"]
    saved, last = saved_ranks(runs[0]), learned["snapshots"][-1]["ranks"]
    shown = {
        f"model.layers.{row}.{column['part']}.{column['name']}": [last[place]]
        for row, places in zip(cells["rows"], cells["cells"], strict=True)
        for column, place in zip(cells["columns"], places, strict=True)
    }
    assert shown == saved and len(shown) == 14

    [cells] = growing["maps"]
    last = growing["snapshots"][-1]["ranks"]
    shown = {
        f"model.layers.{row}.mlp.experts": [last[place] for place in places]
        for row, places in zip(cells["rows"], cells["cells"], strict=True)
    }
    assert shown == saved_ranks(runs[1]) and len(shown) == 2


def test_stable_ranks_have_maps_parts_and_pictures_of_their_own(tmp_path):
    train_run(MIXED, tmp_path / "run")
    [run] = read_runs([tmp_path])
    data = page_data([run], "H200")["runs"][0]
    assert [cells["what"] for cells in data["maps"]] == ["rank", "stable rank"]
    last, saved = data["snapshots"][-1], run.by_adapter(run.stable_ranks)
    for cells, key, layers in zip(data["maps"], ("ranks", "stable_ranks"), (6, 8), strict=True):
        shown = {
            f"model.layers.{row}.{column['part']}.{column['name']}": [last[key][place]]
            for row, places in zip(cells["rows"], cells["cells"], strict=True)
            for column, place in zip(cells["columns"], places, strict=True)
        }
        expected = {name: [3] for name in run.adapters["rank"]} if key == "ranks" else saved
        assert shown == {name: expected[name] for name in run.adapters[cells["what"]]} and len(shown) == layers
    mlp, attention = data["parts"]
    assert (mlp["name"], mlp["what"], mlp["ranks"][-1]) == ("mlp", "rank", [3, 3, 3])
    own = [ranks[0] for name, ranks in saved.items() if "self_attn" in name]
    assert (attention["name"], attention["what"]) == ("self_attn", "stable rank")
    assert attention["ranks"][-1] == [min(own), pytest.approx(sum(own) / 8), max(own)] == data["summary"]["stable"]
    assert data["summary"]["rank"] == [2, pytest.approx((6 * 3 + 8 * 2) / 14), 3]
    pictures = {path.name for path in draw_run(run, tmp_path, "run") + draw_runs([run], tmp_path)}
    assert pictures == {"ranks-run.png", "stable-ranks-run.png", "growth.png"}


def test_routing_stands_beside_the_experts_it_is_of(runs):
    [cells] = page_data(runs, "H200")["runs"][1]["maps"]
    for row, name in enumerate(runs[1].num_experts):
        assert cells["shares"]["near text"][row] == pytest.approx(runs[1].end["routing"]["near text"][name])


def test_attention_and_mlp_are_averaged_apart(runs):
    learned = page_data(runs, "H200")["runs"][0]
    saved = saved_ranks(runs[0])
    for part, number in (("self_attn", 8), ("mlp", 6)):
        own = [ranks[0] for name, ranks in saved.items() if part in name]
        [found] = [found for found in learned["parts"] if found["name"] == part]
        assert found["count"] == len(own) == number
        assert found["ranks"][-1] == [min(own), pytest.approx(sum(own) / number), max(own)]
        assert found["ranks"][0] == [2, 2, 2]


def test_costs_are_those_of_the_adapters_and_of_the_plan(runs, output):
    for run in runs:
        costs = run_costs(run, "H100")
        ours, padded, *_, theirs = costs["arms"]
        tensors = load_file(run.directory / json.loads((run.directory / STATE_FILE).read_text())["tensors"])
        held = sum(tensor.numel() * 4 for name, tensor in tensors.items() if "lora_" in name)
        assert ours["held"]["A, B"] == held  # compacted
        assert ours["held"]["AdamW"] == 2 * held
        plan = owned(run.layers, max(run.ranks), max(run.ranks))
        assert padded["held"]["A, B"] == plan.adapters
        assert padded["held"]["saved"] == plan.saved > ours["held"]["saved"]
        mean = sum(run.ranks) / len(run.ranks)
        assert sum(theirs["held"].values()) == peft(run.layers, mean, 1).total
        assert padded["milliseconds"] == sum(x.lora_cost(max(run.ranks)).milliseconds(GPUS["H100"]) for x in run.layers)
        assert 0 < ours["milliseconds"] <= padded["milliseconds"] < theirs["milliseconds"]
    assert [arm["name"] for arm in run_costs(runs[0], "H100")["arms"]][2] == "padded to the method's maximum, 6"


def test_costs_of_a_sinc_update_are_beside_those_of_lora_of_its_ranks(tmp_path):
    train_run(MIXED, tmp_path)
    [run] = read_runs([tmp_path])
    moved = [layer for layer in run.layers if layer.name in run.adapters["stable rank"]]
    others = [layer for layer in run.layers if layer not in moved]
    assert (len(moved), len(others)) == (8, 6)
    ours, plain, padded, theirs = run_costs(run, "H100")["arms"]
    names = ["these ranks", "LoRA of these ranks", "padded to the method's maximum, 3", "PEFT at the mean rank, 2.43"]
    assert [arm["name"] for arm in (ours, plain, padded, theirs)] == names

    tensors = load_file(run.directory / json.loads((run.directory / STATE_FILE).read_text())["tensors"])
    held = sum(t.numel() * 4 for name, t in tensors.items() if "lora_" in name or "coefficients" in name)
    assert ours["held"]["A, B"] == padded["held"]["A, B"] == held
    assert plain["held"]["A, B"] == held - 8 * 3 * 4
    assert ours["held"]["buffer"] == sinc(moved, 2, 2).buffer > 0
    assert "buffer" not in plain["held"] and "buffer" not in theirs["held"]
    assert ours["held"]["saved"] == plain["held"]["saved"] - sum(layer.u_bytes(2) for layer in moved)
    time = sum(layer.lora_cost(3).milliseconds(GPUS["H100"]) for layer in others)
    for cost in (Layer.sinc_product_cost, lambda layer: layer.sinc_passes_cost(2)):
        time += sum(cost(layer).milliseconds(GPUS["H100"]) for layer in moved)
    assert ours["milliseconds"] == padded["milliseconds"] == pytest.approx(time)


def test_costs_follow_the_rank_of_each_layer(output, tmp_path):
    def uneven(lines):
        lines[-2]["ranks"] = [5 if "mlp" in name else 1 for name in lines[0]["adapters"]]

    [run] = read_runs([rewritten(output / "adapters" / "learned", tmp_path, uneven)])
    features = {name: settings["features"][""] for name, settings in run.start["adapters"].items()}
    held = run_costs(run, "H200")["arms"][0]["held"]
    assert held["A, B"] == 4 * sum((5 if "mlp" in name else 1) * sum(sizes) for name, sizes in features.items())


def test_the_table_has_what_was_measured(runs):
    learned = page_data(runs, "H200")["runs"][0]["summary"]
    assert learned["before"] == {"near text": 3.25}
    assert learned["bits"] == runs[0].end["bits"]
    assert learned["speed"] == pytest.approx(STEPS * 32 / runs[0].seconds)
    assert (learned["steps"], learned["done"], learned["ended"]) == (STEPS, STEPS, True)
    assert learned["method"].startswith("LearnedRank(mean_rank=2, max_rank=6, total_steps=12,")


def test_a_long_run_is_thinned_and_its_mean_loss_stays(runs):
    steps = [{"step": step, "loss": float(step % 7), "seconds": 1.0} for step in range(1, 1201)]
    points = losses(Run(runs[0].directory, "long", runs[0].start, steps, [], None))
    assert len(points) == 400 and points[-1][0] == 1200
    assert sum(loss for _, loss in points) / 400 == pytest.approx(sum(step["loss"] for step in steps) / 1200)
    assert thinned(range(1000), 3) == [0, 500, 999]
    assert thinned(range(3), 3) == [0, 1, 2]


def test_sensitivities_are_means_of_the_last_five():
    lines = [{"step": 0, "ranks": [1, 1]}]
    lines += [{"step": step, "ranks": [1, 1], "sensitivity": [float(step), None]} for step in range(1, 8)]
    lines[3]["sensitivity"][1] = 9.0
    means = [line["sensitivity"] for line in smoothed(lines)]
    assert means == [None, [1, None], [1.5, None], [2, 9], [2.5, 9], [3, 9], [4, 9], [5, 9]]


def test_the_page_holds_all_that_it_shows(runs):
    page = render(runs, "H200")
    assert set(re.findall(r"\b(?:https?|file|ws)://[^\s\"'`;]+", page)) == {"http://www.w3.org/2000/svg"}  # a name
    assert not re.findall(r"\b(?:src|href)=\"(?!data:)|@import|url\(", page)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(found) == json.loads(json.dumps(page_data(runs, "H200")))


def test_a_name_is_text_and_never_markup(output, tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    source = output / "adapters" / "learned"
    page = render(read_runs([rewritten(source, tmp_path, lambda lines: lines[0].update(name=name))]), "H200")
    assert "<img" not in page and page.count("</script>") == 2


@pytest.mark.parametrize(
    "change, ended, points, costs",
    [
        (lambda lines: lines.__delitem__(slice(1, None)), False, 0, True),  # killed before the first step
        (lambda lines: lines.__delitem__(slice(5, None)), False, 4, True),
        (lambda lines: [line.update(loss=None) for line in lines[1:6]], True, STEPS - 5, True),
        (lambda lines: lines[0].update(layers=[], no_layers="quantised"), True, STEPS, False),
    ],
)
def test_a_run_with_gaps_has_a_page(output, tmp_path, change, ended, points, costs):
    run = page_data(read_runs([rewritten(output / "adapters" / "growing", tmp_path, change)]), "H200")["runs"][0]
    assert run["summary"]["ended"] == ended
    assert len(run["loss"]) == points
    assert run["snapshots"][0]["ranks"] == [1] * 8
    assert ("arms" in run["costs"]) == costs and (
        costs or run["costs"]["reason"].endswith("layers are not known: quantised")
    )


def report(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_report_writes_a_page_and_pictures(output, tmp_path):
    result = report(output, "--output", tmp_path / "report")
    assert result.exit_code == 0, (result.output, result.exception)
    names = {"report.html", "growth.png", "ranks-1-learned.png", "experts-2-growing.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    for name in names - {"report.html"}:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") and name in result.output
    assert report(output / "adapters" / "learned", "--output", tmp_path / "report").exit_code == 0  # written anew
    assert "growing" not in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["nowhere"],
            "nowhere is no directory: give the --output of lrlora finetune or demo, or the output dir",
        ),
        (["demo", "empty"], r"empty is no run: it holds no history\.jsonl; give the --output of lrlora finetune"),
        (
            ["adapters"],
            r"adapters holds adapters, but no history\.jsonl.*: give .* or see .* lrlora doctor",
        ),
        (["newer"], "has format version 9, and this lrlora reads 2: update lrlora_ops"),
        (["damaged"], "is damaged in line 3 .*: restore it, or leave this run out"),
        (["demo", "--gpu", "abacus"], "--gpu is abacus; it must be one of GB200, B200, "),
        (["demo", "--output", "empty/file"], r"file cannot be written \(File exists\): choose another --output"),
        ([], r"Missing argument 'RUN\.\.\.'.*\(see lrlora report --help\)"),
    ],
)
def test_bad_input_is_one_line(output, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(output)
    for name in ("empty", "adapters"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapters" / STATE_FILE).write_text("{}")
    if "empty/file" in words:
        (tmp_path / "empty" / "file").write_text("")
    source = output / "adapters" / "growing"
    rewritten(source, tmp_path / "newer", lambda lines: lines[0].update(history=9))
    rewritten(source, tmp_path / "damaged", lambda lines: lines[2].pop("step"))
    assert_one_line(report(*words), message)
    assert not (tmp_path / "lrlora-report").exists()
