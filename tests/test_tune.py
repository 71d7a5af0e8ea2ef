"""The search for tiles: what is tried, what is kept, what is chosen, and the table that is written."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("transformers", reason="needs transformers, as the benchmarks do")

from benchmarks import tune
from benchmarks.tune import Key

configs = importlib.import_module("lrlora_ops.kernels._configs")
primitives = importlib.import_module("lrlora_ops.kernels.primitives")
ROOT = Path(__file__).parents[1]
SHARED = 227 << 10


@pytest.mark.parametrize("key", tune.KEYS, ids=str)
def test_candidates(key):
    first, *others = tune.candidates(key, SHARED)
    assert first == key.shipped
    assert len(others) > 20
    assert len({first, *others}) == len(others) + 1
    for tile in others:
        assert tune.shared_bytes(key, tile) <= SHARED
        assert tile.num_warps * 32 * 128 >= tile.block_m * min(tile.block_n, tile.block_r)
        if key.kernel in ("shrink", "gram", "shrink_gram"):
            assert tile.block_r == key.capacity  # their grids divide the width of U by it
        if key.kernel == "expand":
            assert tile.block_r <= key.capacity


def test_the_smallest_gain_that_counts():
    shipped, other = (configs.Tile(64, 64, 16, 4, stages) for stages in (2, 3))
    assert tune.choose({shipped: 1.0, other: 0.99}, shipped) == shipped
    assert tune.choose({shipped: 1.0, other: 0.97}, shipped) == other
    assert tune.choose({shipped: 1.0, other: float("inf")}, shipped) == shipped


def test_search():
    """A fake GPU likes three stages best, and among what fits there is one such tile."""
    key = Key("shrink", 16)
    tried, found = [], []

    def which_fit(_, tiles):
        return [tile.num_stages < 4 for tile in tiles]

    def times_of(_, tiles):
        tried.extend(tiles)
        return {tile: 1.0 + (tile.num_stages != 3) + tile.block_m / 1e3 + tile.block_n / 1e5 for tile in tiles}

    tune.tune([key], SHARED, which_fit, times_of, lambda *result: found.append(result))
    assert tried[0] == key.shipped
    assert all(tile.num_stages < 4 for tile in tried[1:])
    ((which, tile, seconds, before),) = found
    assert (which, tile.num_stages, tile.block_m, tile.block_n) == (key, 3, 32, 32)
    assert seconds == pytest.approx(1.03232)
    assert before == pytest.approx(2.06528)


def test_a_pinned_tile_is_what_the_launcher_takes():
    key, dtype = Key("shrink", 16), torch.bfloat16
    other = replace(key.shipped, block_m=128)
    with tune.pinned(key, other):
        assert configs.tile_for("shrink", 16, dtype) == other
        assert configs.tile_for("shrink", 32, dtype) != other
        with tune.pinned(key, key.shipped):
            assert configs.tile_for("shrink", 16, dtype) == key.shipped
        assert configs.tile_for("shrink", 16, dtype) == other
    assert configs.tile_for("shrink", 16, dtype) == key.shipped
    for many, rows in enumerate((8, 4096)):
        key = Key("grouped_gemm", many)
        with tune.pinned(key, other):
            assert configs.gemm_tile(rows, dtype) == other
        assert configs.gemm_tile(rows, dtype) == key.shipped


def test_measured_tiles_of_this_gpu_alone(monkeypatch):
    entry = {("shrink", 16, 2): (128, 128, 16, 4, 4)}
    monkeypatch.setattr(configs, "MEASURED", {"A GPU": entry, "Another": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, block_m in (("A GPU", 128), ("Another", 64), ("A third", 64)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        configs.measured.cache_clear()
        assert configs.tile_for("shrink", 16, torch.bfloat16).block_m == block_m
        assert configs.tile_for("shrink", 32, torch.bfloat16) == Key("shrink", 32).shipped
    configs.measured.cache_clear()


@pytest.mark.parametrize(
    "key", [Key("shrink", 16), Key("expand", 32), Key("gram", 16), Key("grouped_gemm", 0)], ids=str
)
def test_calls_are_those_of_the_static_report(key):
    """Ready to be called again: each call is one of the primitive, with tensors of the report's sizes."""
    for case in key.cases("sm_90"):
        call = tune.call_of(case, "meta")
        assert call.func is getattr(primitives, key.kernel)
        first = next(value for value in (*call.args, *call.keywords.values()) if torch.is_tensor(value))
        assert first.shape[0] == tune.static_cases.SHAPE.M


def test_the_table_is_written_for_one_device_at_a_time(tmp_path):
    path = tmp_path / "measured.py"
    path.write_text(tune.PATH.read_text())
    tiles = {("shrink", 16, 2): configs.Tile(64, 128, 16, 4, 4), ("expand", 32, 2): configs.Tile(64, 64, 32, 4, 2)}
    tune.write(path, "A GPU", tiles, "yesterday")
    tune.write(path, "Another", {}, "today")
    tune.write(path, "A GPU", {key: tiles[key] for key in list(tiles)[:1]}, "today")
    namespace: dict = {}
    exec(path.read_text(), namespace)
    assert namespace["MEASURED"] == {"A GPU": {("shrink", 16, 2): astuple(tiles["shrink", 16, 2])}, "Another": {}}
    assert namespace["__doc__"] == tune._measured.__doc__
    assert "# A GPU: today\n# Another: today\n" in path.read_text()
    assert "yesterday" not in path.read_text()


def test_without_a_gpu_nothing_is_timed():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.tune"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "there is no GPU" in finished.stderr
