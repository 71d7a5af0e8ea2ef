"""The planted-rank benchmark, on a network small enough for a test: learned ranks find the planted ones."""

import json
from functools import partial

import pytest

from benchmarks import planted


def test_learned_ranks_find_the_planted_ones(monkeypatch, tmp_path, capsys):
    """Four layers instead of twelve, 400 steps instead of 1000; the command, the arms and the bounds are the same."""
    monkeypatch.setitem(planted.CASES, "dense", partial(planted.dense, ranks=(0, 1, 4, 16)))
    file = tmp_path / "rows.json"
    arms = ["uniform", "learned"]
    planted.main(["--case", "dense", "--seeds", "1", "--steps", "400", "--json", str(file), "--methods", *arms])

    table = capsys.readouterr().out
    uniform, learned = json.loads(file.read_text())
    for row, method in ((uniform, "uniform"), (learned, "learned")):
        assert list(row) == ["case", "seed", "method", "loss", "spearman", "budget", "ranks", "planted"]
        assert (row["case"], row["seed"], row["method"], row["budget"]) == ("dense", 1, method, 21)
        assert sorted(row["planted"]) == [0, 1, 4, 16] and sum(row["ranks"]) == 21
        assert f"{row['loss']:.4f}" in table
    assert uniform["ranks"] == [6, 5, 5, 5]
    assert learned["loss"] <= 0.35 * uniform["loss"]
    assert learned["spearman"] >= 0.9


def test_the_oracle_has_the_planted_ranks_and_the_task_is_what_it_says():
    case = planted.dense(0)
    assert sorted(case.planted.values()) == [0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16] and case.budget == 62
    ranks = {name: method.rank for name, method in planted.oracle(case, 1).items()}
    assert ranks == case.planted
    assert sum(method.rank for method in planted.uniform(case, 1).values()) == 62
    student, teacher = case.student.state_dict(), case.teacher.state_dict()
    for name, rank in case.planted.items():
        delta = (teacher[f"{name}.weight"] - student[f"{name}.weight"]).double()
        assert int((delta.svd().S > 1e-4).sum()) == rank
        assert delta.norm().item() == pytest.approx(2.0 if rank else 0.0, rel=1e-5)


def test_a_seed_repeats_itself():
    losses = [planted.run("dense", 5, "learned", steps=4).history for _ in range(2)]
    assert losses[0] == losses[1]


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
    assert planted.spearman(a, b) == pytest.approx(correlation, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "missing/rows.json"], "cannot write missing/rows.json: No such file or directory"),
        (["--json", "."], "cannot write .: Is a directory"),
        (["--steps", "3"], "--steps is 3; it must be at least 50"),
    ],
)
def test_bad_arguments_are_noticed_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        planted.main(arguments)
    assert message in capsys.readouterr().err
