"""The search for tiles that are shipped: what is called, and the table that is written."""

from __future__ import annotations

import importlib
from dataclasses import astuple

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("transformers", reason="needs transformers, as the benchmarks do")

from benchmarks import tune
from benchmarks.tune import Key

configs = importlib.import_module("lrlora_ops.kernels._configs")


def test_measured_tiles_of_this_gpu_alone(monkeypatch):
    entry = {("shrink", 16, 2): (128, 128, 16, 4, 4)}
    monkeypatch.setattr(configs, "MEASURED", {"A GPU": entry, "Another": {}})
    monkeypatch.setattr(configs, "user_tiles", dict)
    for device, block_m in (("A GPU", 128), ("Another", 64), ("A third", 64)):
        monkeypatch.setattr(configs, "device_name", lambda device=device: device)
        configs.measured.cache_clear()
        assert configs.tile_for("shrink", 16, torch.bfloat16, 9, 9).block_m == block_m
        assert configs.tile_for("shrink", 32, torch.bfloat16, 9, 9) == configs.CONFIGS["cuda", 2]["shrink"][32]
    configs.measured.cache_clear()


@pytest.mark.parametrize(
    ("key", "count"),
    [
        (Key("shrink", 16), 2),
        (Key("expand", 32), 2),
        (Key("gram", 16), 2),
        (Key("grouped_gemm", 0), 1),
        (Key("sinc_weight", 16), 1),
        (Key("sinc_gradients", 64), 1),
    ],
    ids=str,
)
def test_calls_are_those_of_the_static_report(key, count):
    """Each call is one of the primitive, with tensors of the report's sizes, and can be made again."""
    calls = key.calls("meta")
    assert len(calls) == count
    for call in calls:
        assert call.primitive == key.kernel
        first = next(value for value in call.arguments.values() if torch.is_tensor(value))
        assert first.shape[0] == tune.static_cases.SHAPE.M
        assert (call.arguments.get("weight", 0) is None) == (key.kernel == "sinc_gradients")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "there is no GPU" in capsys.readouterr().err
