"""Rank tables and heatmaps: every rank in its place."""

import io

import pytest
from matplotlib.image import imread
from rich.console import Console

from lrlora_ops.report import RankMatrix, heatmap, rank_table

PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]


def decoder(ranks):
    """Names of a decoder's layers with these ranks, a row per layer."""
    return {
        f"model.layers.{layer}.{name}": rank
        for layer, row in enumerate(ranks)
        for name, rank in zip(PROJECTIONS, row, strict=True)
    }


def show(table):
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return [line.split() for line in text.getvalue().splitlines() if line.strip("─ ")]


def test_table_has_layers_modules_and_group_means():
    lines = show(rank_table(decoder([[1, 4, 7], [2, 8, 0]]), "Ranks"))
    assert lines[0] == ["Ranks"]
    assert lines[-3:] == [
        ["0", "1", "4", "7", "2.5", "7.0"],
        ["1", "2", "8", "0", "5.0", "0.0"],
        ["mean", "1.5", "6.0", "3.5", "3.8", "3.5"],
    ]
    assert lines[1:-3] == [["mean", "mean"], ["layer", "q", "o", "up", "self_attn", "mlp"]]


@pytest.mark.parametrize(
    "names, rows, groups",
    [
        (["model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"], ["0", "10"], ["mlp"]),
        (["encoder.0.fc", "decoder.0.fc"], ["encoder 0", "decoder 0"], [""]),  # two stacks
        (["h.0.attn.qkv", "projector.linear"], ["0", "projector"], ["attn", ""]),  # a layer outside the stack
        (["linear"], ["model"], [""]),  # no stack at all
        (["h.3"], ["3"], [""]),  # the layers themselves are linear
        (["a.0.x.q", "a.0.y.k", "a.1.x.k"], ["0", "1"], ["x", "y"]),  # a group's modules come from several layers
    ],
)
def test_names_of_any_model_find_their_place(names, rows, groups):
    matrix = RankMatrix.of({name: index + 1 for index, name in enumerate(names)})
    assert matrix.rows == rows
    assert list(matrix.groups) == groups
    assert sorted(matrix.ranks.values()) == list(range(1, len(names) + 1))


def test_a_layer_without_a_module_leaves_its_cell_empty():
    ranks = decoder([[1, 4, 7], [2, 8, 0]])
    del ranks["model.layers.1.mlp.up_proj"]
    assert show(rank_table(ranks))[-2] == ["1", "2", "8", "5.0"]
    assert RankMatrix.of(ranks).mean("1", "mlp") is None


def test_heatmap_draws_every_rank(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *args, **kwargs: drawn.append(args[1:4]) or text(*args, **kwargs))
    heatmap(decoder([[1, 4, 7], [2, 8, 0]]), tmp_path / "ranks.png")
    assert drawn == [(0, 0, "1"), (1, 0, "4"), (0, 1, "2"), (1, 1, "8"), (0, 0, "7"), (0, 1, "0")]


@pytest.mark.parametrize("ranks", [[[0, 0, 0]], [[1, 4, 7], [2, 8, 0]], [[3, 3, 3]] * 40])
def test_heatmap_is_a_picture_that_grows_with_the_model(tmp_path, ranks):
    heatmap(decoder(ranks), tmp_path / "ranks.png")
    image = imread(tmp_path / "ranks.png")
    height, width, _ = image.shape
    assert width > 400 and 200 + 40 * len(ranks) < height < 600 + 80 * len(ranks)
    assert image[..., :3].std() > 0.05
