"""The planted-rank benchmark, on networks small enough for a test: learned ranks find the planted ones."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.planted import cases
from benchmarks.planted.__main__ import main
from benchmarks.planted.arms import ARMS, serves
from benchmarks.planted.networks import MAX_RANK
from benchmarks.planted.trial import run, spearman
from lrlora_ops import FixedRank, SincUpdate, apply_lora

COLUMNS = ["case", "seed", "method", "loss", "spearman", "budget", "ranks", "planted"]


def test_learned_ranks_find_the_planted_ones(monkeypatch, tmp_path, capsys):
    """Four layers instead of twelve, 400 steps instead of 1000; the command, the arms and the bounds are the same."""
    monkeypatch.setitem(cases.CASES, "dense", partial(cases.dense, ranks=(0, 1, 4, 16)))
    file = tmp_path / "rows.json"
    arms = ["uniform", "learned"]
    main(["--case", "dense", "--seeds", "1", "--steps", "400", "--json", str(file), "--methods", *arms])

    table = capsys.readouterr().out
    uniform, learned = json.loads(file.read_text())
    for row, method in ((uniform, "uniform"), (learned, "learned")):
        assert list(row) == COLUMNS
        assert (row["case"], row["seed"], row["method"], row["budget"]) == ("dense", 1, method, 21)
        assert sorted(row["planted"]) == [0, 1, 4, 16] and sum(row["ranks"]) == 21
        assert f"{row['loss']:.4f}" in table
    assert uniform["ranks"] == [6, 5, 5, 5]
    assert learned["loss"] <= 0.35 * uniform["loss"]
    assert learned["spearman"] >= 0.9


def unexplained(method, update):
    """What 300 steps leave of an update of one layer that is planted, as a share of its squared norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        planted = nn.Parameter(torch.zeros(64, 64))
        cases.move(planted, update(4))
        wanted = (model[0].weight + planted).t()
    adapters = apply_lora(model, method, "all-linear")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        left = (model(torch.eye(64)) - wanted).square().sum() / planted.detach().square().sum()
        left.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return left.item()


def test_sinc_update_fits_a_full_rank_update_that_lora_of_its_size_cannot():
    """A sine of the elements of a product of rank 4: of rank 64, and no matrix of rank 4 is near it."""
    torch.manual_seed(0)
    values = torch.linalg.svdvals(cases.elementwise(4)).square()
    assert values[-1] > 0 and values[4:].sum() / values.sum() > 0.25
    lora, sinc = (unexplained(method, cases.elementwise) for method in (FixedRank(4), SincUpdate(4)))
    assert lora > 0.25 and sinc < 0.5 * lora
    assert unexplained(SincUpdate(4), cases.low_rank) < 1e-3  # and a product itself as LoRA does


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense-elementwise", "dense-equal"])
def test_sinc_update_on_the_planted_networks(case):
    """docs/sinc.md has the table, of three seeds."""
    lora, sinc = (run(case, 0, method).loss for method in ("uniform", "sinc"))
    assert sinc < 0.85 * lora if case == "dense-elementwise" else max(sinc, lora) < 1e-3


def test_every_arm_of_experts_spends_the_budget(monkeypatch, tmp_path, capsys):
    """Two layers of three experts: 7 components each, and DynamicRank's and uniform's 14 / 6 rounded to 2 each."""
    monkeypatch.setitem(cases.CASES, "moe", partial(cases.moe, ranks=(0, 1, 6)))
    file = tmp_path / "rows.json"
    main(["--case", "moe", "--seeds", "1", "--steps", "50", "--json", str(file)])

    table, rows = capsys.readouterr().out, json.loads(file.read_text())
    assert [row["method"] for row in rows] == [arm for arm in ARMS if arm != "sinc"]
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["case"], row["seed"], row["budget"]) == ("moe", 1, 14)
        assert sorted(row["planted"][:3]) == sorted(row["planted"][3:]) == [0, 1, 6]
        assert f"{row['loss']:.4f}" in table and 0 < row["loss"] < 1
    uniform, paper, saliency, learned, oracle = (row["ranks"] for row in rows)
    assert uniform == [2] * 6
    for ranks in (paper, saliency):
        assert sum(ranks[:3]) == sum(ranks[3:]) == 6 and min(ranks) >= 1
    assert paper != uniform
    assert sum(learned) == 14 and max(learned) <= MAX_RANK
    assert oracle == rows[0]["planted"]


@pytest.mark.parametrize(
    "name, small, budget",
    [
        ("dense-powerlaw", partial(cases.dense_power_law, exponents=(0.5, 2.0), budget=9), 9),
        ("moe-powerlaw", partial(cases.moe_power_law, exponents=(0.5, 1.0, 2.0), budget=20), 20),
    ],
)
def test_power_laws_through_the_command(name, small, budget, monkeypatch, tmp_path):
    monkeypatch.setitem(cases.CASES, name, small)
    file = tmp_path / "rows.json"
    main(["--case", name, "--seeds", "3", "--steps", "50", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["method"] for row in rows] == [arm for arm in ARMS if serves(arm, name)]
    for row in rows:
        assert (row["case"], row["budget"], sum(row["planted"])) == (name, budget, budget)
        assert 0 < row["loss"] < 1
        if row["method"] in ("learned", "oracle"):
            assert sum(row["ranks"]) == budget


def test_the_oracle_has_the_planted_ranks_and_the_task_is_what_it_says():
    case = cases.dense(0)
    planted = [rank for (rank,) in case.planted.values()]
    assert sorted(planted) == [0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16] and (case.budget, case.groups) == (62, 12)
    student, teacher = case.student.state_dict(), case.teacher.state_dict()
    for name, (rank,) in case.planted.items():
        check_update(teacher[f"{name}.weight"] - student[f"{name}.weight"], rank)
    oracle = ARMS["oracle"](case, 1).ranks()
    assert {name: [int(rank)] for name, rank in oracle.items()} == case.planted
    assert sum(int(rank) for rank in ARMS["uniform"](cases.dense(0), 1).ranks().values()) == 62


def test_the_experts_are_moved_by_the_planted_ranks():
    case = cases.moe(0)
    assert (case.budget, case.groups) == (154, 32)
    for name, ranks in case.planted.items():
        assert sorted(ranks) == sorted([0, 1, 2, 4, 8, 16] * 2 + [1, 2, 4, 8])
        for projection in (name, name.replace("up", "down")):
            student, teacher = (model.get_submodule(projection).weight for model in (case.student, case.teacher))
            for expert, rank in enumerate(ranks):
                check_update(teacher[expert] - student[expert], rank)
    oracle = ARMS["oracle"](case, 1).ranks()
    for name, ranks in case.planted.items():
        assert oracle[name].tolist() == oracle[name.replace("up", "down")].tolist() == ranks


def check_update(update, rank):
    assert int((torch.linalg.svdvals(update.double()) > 1e-4).sum()) == rank
    assert update.norm().item() == pytest.approx(2.0 if rank else 0.0, rel=1e-5)


def test_load_follows_zipf_and_says_nothing_about_the_planted_ranks():
    shares = torch.arange(1, 17).float().reciprocal()
    correlations = []
    for seed in range(20):
        case = cases.moe(seed)
        for layer, ranks in zip(case.student.layers, case.planted.values(), strict=True):
            load = torch.bincount(layer.expert_of_token, minlength=16) / cases.VOCABULARY
            # 4096 draws: five standard deviations of each share
            expected = shares / shares.sum()
            assert ((load.sort(descending=True).values - expected).abs() < 5 * (expected / 4096).sqrt()).all()
            assert layer.routing_weight.min() >= 0.3 and layer.routing_weight.max() <= 1
            correlations.append(spearman(load.tolist(), ranks))
    assert abs(sum(correlations) / 40) < 0.16  # four standard deviations of the mean: 4 / sqrt(15 * 40)


def test_truncation_keeps_the_largest_singular_values_by_importance():
    chosen = {"one": [0.0, 0.0], "other": [0.0]}  # flat spectra: importance alone decides
    importance = torch.tensor([1.0, 3.0, 2.0])
    assert cases._truncate(chosen, importance, 30) == {"one": [0, MAX_RANK], "other": [6]}
    # Shares 1, 1/16, 1/81 and 1, 1/4, 1/9, 1/16 of sums 1.082 and 1.622: in order .924 .616 .154 .068 .058
    steep = cases._truncate({"one": [2.0], "other": [1.0]}, torch.ones(2), 5)
    assert steep == {"one": [2], "other": [3]}


@pytest.mark.parametrize("name, method", [("dense", "learned"), ("moe", "learned"), ("moe", "dynamic-paper")])
def test_a_seed_repeats_itself(name, method, monkeypatch):
    if name == "moe":
        monkeypatch.setitem(cases.CASES, "moe", partial(cases.moe, ranks=(0, 1, 6)))
    first, second = (run(name, 5, method, steps=20) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "a, b, correlation",
    [
        ([1, 2, 3, 4], [2, 4, 8, 16], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 4], [1, 2, 3, 4], 0.948683),  # a tie: average ranks
        ([5, 5, 5, 5], [1, 2, 3, 4], 0.0),  # constant: no correlation
    ],
)
def test_spearman_by_hand(a, b, correlation):
    assert spearman(a, b) == pytest.approx(correlation, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "missing/rows.json"], "cannot write missing/rows.json: No such file or directory"),
        (["--json", "."], "cannot write .: Is a directory"),
        (["--steps", "3"], "--steps is 3; it must be at least 50"),
        (["--methods", "dynamic-paper"], "dynamic-paper divides a layer among its experts; use --case moe"),
    ],
)
def test_bad_arguments_are_noticed_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
