"""Rank tables and heatmaps: every rank in its place."""

import io

import pytest
import torch
from matplotlib.image import imread
from rich.columns import Columns
from rich.console import Console

from lrlora_ops.expert_map import ExpertMap, expert_heatmap, expert_panels
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


def test_stable_ranks_have_a_decimal():
    """As Adapters.ranks() gives them, tensors beside those of other methods."""
    ranks = decoder([[1, 4, torch.tensor(7.26)], [2, torch.tensor(8, dtype=torch.int32), torch.tensor(0.0)]])
    assert show(rank_table(ranks))[-3:-1] == [
        ["0", "1", "4", "7.3", "2.5", "7.3"],
        ["1", "2", "8", "0.0", "5.0", "0.0"],
    ]
    up = {name: rank for name, rank in ranks.items() if "up" in name}
    rest = {name: rank for name, rank in ranks.items() if "up" not in name}
    what = [RankMatrix.of(own).what for own in (up, rest, ranks)]
    assert what == ["stable rank", "rank", "rank, or stable rank x.x"]


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


NEAR = {"near": [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]}


def experts(ranks, shares, name="model.layers.{}.mlp.experts"):
    """A map of layers with these ranks and shares, a row per layer."""
    names = [name.format(layer) for layer in range(len(ranks))]
    routing = {
        text: {layer: torch.tensor(row, dtype=torch.float64) for layer, row in zip(names, rows, strict=True)}
        for text, rows in shares.items()
    }
    return ExpertMap.of({layer: torch.tensor(row) for layer, row in zip(names, ranks, strict=True)}, routing)


def printed(expert_map, width):
    text = io.StringIO()
    Console(file=text, width=width).print(Columns(expert_panels(expert_map), padding=(0, 3)))
    return [line.split() for line in text.getvalue().splitlines() if line.strip()]


def test_weighted_rank_is_the_rank_that_a_row_meets():
    assert experts([[2, 4, 8], [1, 9, 9]], NEAR).weighted_rank("near") == (2 * 0.5 + 4 * 0.25 + 8 * 0.25 + 1) / 2


def test_experts_stand_in_columns_and_texts_beside_ranks_where_there_is_room():
    expert_map = experts([[2, 4, 8], [1, 9, 9]], NEAR)
    ranks = [["layer", "0", "1", "2"], ["0", "2", "4", "8"], ["1", "1", "9", "9"]]
    shares = [["layer", "0", "1", "2"], ["0", "50", "25", "25"], ["1", "100", "0", "0"]]
    titles = [["rank,", "mean", "5.5"], ["%", "of", "rows,", "near,", "token-weighted", "rank", "2.5"]]
    assert printed(expert_map, width=40) == [titles[0], *ranks, titles[1], *shares]
    side_by_side = [[*rank, *share] for rank, share in zip(ranks, shares, strict=True)]
    assert printed(expert_map, width=100) == [titles[0] + titles[1], *side_by_side]


def test_many_experts_take_several_lines():
    lines = printed(experts([list(range(20))], {}), width=80)
    assert lines[1:] == [
        ["layer", *map(str, range(16))],
        ["0", *map(str, range(16))],
        ["layer", "16", "17", "18", "19"],
        ["0", "16", "17", "18", "19"],
    ]


def test_layers_of_two_stacks_keep_their_whole_names():
    ranks = {"encoder.0.experts": torch.tensor([1, 2]), "decoder.0.experts": torch.tensor([3, 4])}
    assert ExpertMap.of(ranks, {}).layers == list(ranks)


@pytest.mark.parametrize(
    "num_layers, num_experts, numbers",
    [(4, 16, 2 * 4 * 16 * 2), (2, 3, 2 * 2 * 3 * 2), (48, 128, 0)],  # too many for a number in each cell
)
def test_expert_heatmap_has_a_row_per_arm_and_stays_readable(tmp_path, monkeypatch, num_layers, num_experts, numbers):
    drawn = []
    from matplotlib.axes import Axes

    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *args, **kwargs: drawn.append(args[1:4]) or text(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(33, (num_layers, num_experts), generator=generator)
    shares = torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64)
    expert_map = experts(ranks.tolist(), {"near": (shares / shares.sum(1, keepdim=True)).tolist()})
    expert_heatmap({"first": expert_map, "second": expert_map}, tmp_path / "experts.png")
    assert len(drawn) == numbers
    if numbers:
        first = drawn[: num_layers * num_experts]
        assert first == [(x, y, str(int(rank))) for y, row in enumerate(ranks) for x, rank in enumerate(row)]
    image = imread(tmp_path / "experts.png")
    assert image.shape[1] > 2 * 150 * 0.07 * num_experts and image.shape[0] > 2 * 150 * 0.16 * num_layers
    assert image[..., :3].std() > 0.05


def test_expert_heatmap_of_layers_of_different_sizes_and_of_zeros(tmp_path):
    ranks = {"layers.0.experts": torch.tensor([0, 0, 0]), "layers.1.experts": torch.tensor([0])}
    expert_heatmap({"none": ExpertMap.of(ranks, {})}, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
