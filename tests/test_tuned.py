"""lrlora tune: what a model's layers launch, what is tried, what is chosen and kept; a fake GPU says what is fast."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("transformers")
pytest.importorskip("typer")
from triton.runtime.interpreter import InterpretedFunction
from typer.testing import CliRunner

from lrlora_ops.cli import app
from lrlora_ops.finetune import tuned
from lrlora_ops.finetune.environment import environment
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.methods import FixedRank, SincUpdate
from lrlora_ops.ops import _backends
from lrlora_ops.tuning import search as searching
from lrlora_ops.tuning.calls import Call
from lrlora_ops.tuning.candidates import accumulators, candidates, shared_bytes
from lrlora_ops.tuning.search import agree, choose, search
from tests._cli import assert_one_line

configs = importlib.import_module("lrlora_ops.kernels._configs")
user_tiles = importlib.import_module("lrlora_ops.kernels._user_tiles")

ROOT = Path(__file__).parents[1]
CPU, SHARED, RANK, TOKENS = torch.device("cpu"), 227 << 10, 5, 6
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "dtype": "float32",
}
KEYS = [(kernel, rank, size, 512, (4096,)) for kernel in configs._CUDA for rank in (16, 128) for size in (2, 4)]
KEYS += [("grouped_gemm", many, size, 512, (4096, 4096)) for many in (0, 1) for size in (2, 4)]


def shipped_for(key):
    table = configs.GEMM_CONFIGS if key[0] == "grouped_gemm" else configs.CONFIGS
    found = table["cuda", key[2]]
    return found[key[1]] if key[0] == "grouped_gemm" else found[key[0]][key[1]]


class FakeGpu:
    """Likes three stages best, then small tiles; five stages do not fit it."""

    max_shared, device = SHARED, CPU

    def __init__(self, patience=100):
        self.asked, self.patience = [], patience

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def fitting(self, key, calls, tiles):
        return [tile.num_stages < 5 for tile in tiles]

    def seconds(self, key, calls, tiles):
        self.asked.append((key, calls, tiles))
        if len(self.asked) > self.patience:
            raise KeyboardInterrupt
        return {tile: 1.0 + (tile.num_stages != 3) + (tile.block_m + tile.block_n) / 1e3 for tile in tiles}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def calls_with(method, model):
    """Of a training step of each kind of layer, with the keys of the tiles that each asks for."""
    layers = tuned.distinct_layers(model, ("q_proj", "experts"), TOKENS, "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_backends._BY_DEVICE, "cpu", "triton")
        made = [call for module, layer in layers for call in tuned.layer_calls(module, layer, method, CPU)]
        patch.setattr(InterpretedFunction, "run", lambda *_, **__: None)  # what is asked for is known without a launch
        return [(call, call.keys()) for call in made]


@pytest.fixture(scope="module")
def calls(model):
    return calls_with(FixedRank(RANK), model)


@pytest.fixture(scope="module")
def sinc_calls(model):
    return calls_with(SincUpdate(RANK), model)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates(key):
    shipped = shipped_for(key)
    first, *others = candidates(key, shipped, SHARED)
    assert first == shipped
    assert 20 < len(others) == len({first, *others}) - 1
    for tile in others:
        assert shared_bytes(key, tile) <= SHARED
        assert accumulators(key, tile) <= 128
        if key[0] == "expand":
            assert tile.block_r <= key[1]
        elif key[0] != "grouped_gemm":
            assert tile.block_r == shipped.block_r  # their grids divide the width of U by it
        assert user_tiles._item({**dict(zip(("kernel", "capacity", "itemsize", "rows", "features"), key, strict=True)),
                                 "tile": astuple(tile)})  # fmt: skip


def test_the_smallest_gain_that_counts():
    shipped, other = (configs.Tile(64, 64, 16, 4, stages) for stages in (2, 3))
    assert choose({shipped: 1.0, other: 0.99}, shipped) == shipped
    assert choose({shipped: 1.0, other: 0.97}, shipped) == other
    assert choose({shipped: 1.0, other: float("inf")}, shipped) == shipped


def test_the_fastest_of_what_fits_wins():
    key, gpu = ("shrink", 16, 2, 512, (4096,)), FakeGpu()
    shipped = shipped_for(key)
    result = search(key, shipped, [], gpu)
    ((_, _, tried),) = gpu.asked
    assert tried[0] == shipped
    assert all(tile.num_stages < 5 for tile in tried)
    assert result.tile == configs.Tile(32, 32, 16, 4, 3)
    assert (result.fitting, result.tried) == (len(tried), len(candidates(key, shipped, SHARED)))
    assert result.seconds == pytest.approx(1.064)
    assert result.shipped_seconds == pytest.approx(2.192)


# A SincUpdate's weights are moved by kernels of their own; the products are the base's, and of experts gram's.
SINC = {"sinc_weight", "sinc_gradients"}
TUNED = {*configs._CUDA, "grouped_gemm"} - SINC


def test_a_step_asks_for_every_kernel_that_has_tiles(calls):
    keys = {key: tile for _, found in calls for key, tile in found.items()}
    assert {key[0] for key in keys} == TUNED
    assert ("shrink", 16, 4, 4, (24,)) in keys  # 6 rows, as many as from 4 on
    assert ("gated_shrink", 16, 4, 4, (16,)) in keys  # 12 rows of 3 experts
    for out_features in (32, 24, 16):
        assert any(key[0] == "grouped_gemm" and key[4][1] == out_features for key in keys)
    assert all(tile == shipped_for(key) for key, tile in keys.items())


def test_a_step_of_sinc_updates_asks_for_their_kernels(sinc_calls):
    """Each of them by itself, for a weight; and for the products of experts."""
    keys = {key: tile for _, found in sinc_calls for key, tile in found.items()}
    assert {key[0] for key in keys} == {*SINC, "gram", "grouped_gemm"}
    # q_proj [24, 24], gate_up_proj [3, 32, 24], down_proj [3, 24, 16]; nine coefficients.
    for kernel in SINC:
        shapes = {(16, 24), (32, 24), (16, 16)}  # rows as many as from there on, columns
        assert {(rows, columns) for name, _, _, rows, (columns, *_) in keys if name == kernel} == shapes
        assert all(key[1:3] == (16, 4) and key[4][1] == 9 for key in keys if key[0] == kernel)
        assert [call.primitive for call, found in sinc_calls for key in found if key[0] == kernel] == [kernel] * 3
    assert all(tile == shipped_for(key) for key, tile in keys.items())


def assert_tiles_agree(calls):
    """Smallest and largest blocks compute what the shipped tile does; returns the kernels for which that was seen."""
    checked = set()
    for call, keys in calls:
        for key, shipped in keys.items():
            if key[0] in checked or key[0] != call.primitive:
                continue
            checked.add(key[0])
            expected = call.results()
            assert all(result.isfinite().all() and result.any() for result in expected)
            sizes = sorted(candidates(key, shipped, SHARED), key=lambda tile: tile.block_m * tile.block_n)
            for tile in (sizes[0], sizes[-1]):
                with configs.pinned(key, tile):
                    assert agree(call.results(), expected), (key, tile)
            assert not agree([result * 1.001 for result in expected], expected)
            assert not agree([result * float("nan") for result in expected], expected)
    return checked


def test_a_call_can_be_made_again_with_any_tile(calls):
    """Also from counters that a call has used up."""
    assert assert_tiles_agree(calls) == TUNED


def test_a_sinc_call_can_be_made_again_with_any_tile(sinc_calls):
    """Also from an m that a call has written a weight over."""
    assert assert_tiles_agree(sinc_calls) == SINC


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_called_alone_is_what_the_product_calls(transposed):
    """The same weight, from the same factors; of ``dy^T x``, the same gradients and the weight in its place."""
    n, k, rank = 24, 40, 3
    sizes = {"a": (rank, k), "b": (rank, n), "weight": (1, k, n) if transposed else (1, n, k), "c": (9,)}
    given = {name: torch.randn(size) for name, size in sizes.items()}
    given |= {"transposed": transposed, "group_offsets": None, "grid": 1.0, "scaling": 2.0, "dtype": torch.float32}
    x, dy = torch.randn(7, k), torch.randn(7, n)
    call = Call("sinc_gemm", {"x": x, "bias": None, "row_index": None, **given})
    (part,) = call.alone()
    moved = part.results()[0][0]
    torch.testing.assert_close(call.results()[0], x @ (moved if transposed else moved.t()))

    indices = dict.fromkeys(("dy_index", "x_index", "row_weights"))
    backward = Call(
        "sinc_gemm_backward", {"dy": dy, "x": x, "needs_rows": True, "needs_low_rank": True, **indices, **given}
    )
    (part,) = backward.alone()
    m = (x.t() @ dy if transposed else dy.t() @ x)[None]
    part.arguments["m"] = m.clone()
    *gradients, weight = part.results()
    _, d_a, d_b, d_c = backward.results()
    for found, expected in zip(gradients, (d_b, d_a, d_c) if transposed else (d_a, d_b, d_c), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight[0], moved)
    assert torch.equal(part.arguments["m"], m)
    assert part.alone() == []


def test_weights_that_are_called_alone_are_all_set(poison):
    """Where a step leaves an expert without rows, its weight could not be compared."""
    given = {"weight": torch.randn(2, 24, 40), "a": torch.randn(6, 40), "b": torch.randn(6, 24), "c": torch.randn(9)}
    given |= {"transposed": False, "group_offsets": torch.tensor([0, 0, 7], dtype=torch.int32), "row_index": None}
    given |= {"x": torch.randn(7, 40), "bias": None, "grid": 1.0, "scaling": 2.0, "dtype": torch.float32}
    call = Call("sinc_gemm", given)
    (part,) = call.alone()
    assert part.results()[0].isfinite().all()
    with configs.asked() as found:
        call()
    assert part.keys() | call.keys() == found


def test_sums_of_rounded_products_are_compared_as_such():
    """Backward makes m in the products' dtype: where the order of sums moves an ulp of it, the gradients follow."""
    given = {name: torch.randn(size).bfloat16() for name, size in {"dy": (7, 24), "x": (7, 40)}.items()}
    given |= {"weight": torch.randn(1, 24, 40).bfloat16(), "transposed": False, "grid": 1.0, "scaling": 2.0}
    given |= dict.fromkeys(("group_offsets", "dy_index", "x_index", "row_weights"))
    given |= {"a": torch.randn(3, 40), "b": torch.randn(3, 24), "c": torch.randn(9), "dtype": torch.bfloat16}
    call = Call("sinc_gemm_backward", {**given, "needs_rows": True, "needs_low_rank": True})
    assert {result.dtype for result in call.results()} == {torch.bfloat16}
    assert [result.dtype for result in call.alone()[0].results()] == [torch.float32] * 3 + [torch.bfloat16]


def test_a_pinned_tile_is_what_its_key_gets():
    key, dtype = ("shrink", 16, 2, 512, (4096,)), torch.bfloat16
    shipped = shipped_for(key)
    other = replace(shipped, block_m=128)
    with configs.pinned(key, other):
        assert configs.tile_for("shrink", 16, dtype, 512, 4096) == other
        assert configs.tile_for("shrink", 16, dtype, 512, 4095) == shipped
        with configs.pinned(key, shipped):
            assert configs.tile_for("shrink", 16, dtype, 512, 4096) == shipped
        assert configs.tile_for("shrink", 16, dtype, 512, 4096) == other
    assert configs.tile_for("shrink", 16, dtype, 512, 4096) == shipped


@pytest.fixture
def a_gpu(tmp_path, monkeypatch):
    """A machine with the fake one, and no tiles yet."""
    monkeypatch.setitem(_backends._BY_DEVICE, "cpu", "triton")
    monkeypatch.setenv(user_tiles.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "_require_gpu", lambda: None)
    monkeypatch.setattr(tuned, "Gpu", lambda _: FakeGpu())
    for module in (configs, tuned):
        monkeypatch.setattr(module, "device_name", lambda: "A GPU")
    configs.user_tiles.cache_clear()
    yield
    monkeypatch.undo()
    configs.user_tiles.cache_clear()


def test_the_command(model, a_gpu, monkeypatch):
    """On a fake GPU: what is found is kept at once and taken, and a second run does the rest."""
    command = ["tune", str(model), "--tokens", str(TOKENS), "--rank", "4", "--targets", "q_proj"]

    monkeypatch.setattr(tuned, "Gpu", lambda _: FakeGpu(patience=2))
    configs.user_tiles.cache_clear()
    stopped = CliRunner().invoke(app, command)
    assert (stopped.exit_code, len(load())) == (130, 2), stopped.output
    assert "A GPU: layers of 1 sizes, 6 tokens, rank 4" in stopped.output
    assert "shrink (rank to 16, 4+ rows, 24, 4 bytes): 16x16x16, 4 warps, 3 stages" in stopped.output

    monkeypatch.setattr(tuned, "Gpu", lambda _: FakeGpu())
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert "2 tiles tuned, 2 of them other than shipped" in second.output
    assert {key[0] for key in load()} == {"shrink", "expand", "gram", "shrink_gram"}
    configs.user_tiles.cache_clear()
    assert configs.tile_for("shrink", 16, torch.float32, TOKENS, 24) == configs.Tile(16, 16, 16, 4, 3)
    assert environment()["tiles"] == "4 of lrlora tune, then shipped"

    known = Mock(keys=lambda: {key: shipped_for(key) for key in load()})
    monkeypatch.setattr(tuned, "layer_calls", lambda *_: [known])
    assert "nothing is left to tune" in CliRunner().invoke(app, command).output
    assert "4 tiles tuned" in CliRunner().invoke(app, [*command, "--again"]).output


def test_the_command_for_a_sinc_update(model, a_gpu):
    """The tiles are for its number of coefficients."""
    command = ["tune", str(model), "--tokens", str(TOKENS), "--rank", "4", "--targets", "q_proj", "--method", "sinc"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "2 tiles tuned, 2 of them other than shipped" in result.output
    words = "(rank to 16, 16+ rows, 24 columns, 9 coefficients, 4 bytes): 32x16x16, 4 warps, 3 stages"
    assert all(f"{kernel} {words}" in result.output for kernel in SINC)
    configs.user_tiles.cache_clear()
    of_nine, of_eleven = (configs.tile_for("sinc_weight", 16, torch.float32, 24, 24, count) for count in (9, 11))
    assert of_nine == configs.Tile(32, 16, 16, 4, 3)
    assert of_eleven == shipped_for(("sinc_weight", 16, 4))


def load():
    return user_tiles.load("A GPU", user_tiles.Identity.here())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(model):
    assert_one_line(CliRunner().invoke(app, ["tune", str(model)]), "sees no GPU here; tiles are timed on the GPU")


@pytest.mark.parametrize("option, words", [("tokens", "at least 2"), ("rank", "at least 1"), ("jobs", "at least 1")])
def test_options_out_of_range(model, option, words):
    values = {"tokens": 9, "rank": 9, "jobs": 9, option: 0}
    with pytest.raises(CommandError, match=f"--{option} is 0; it must be {words}"):
        tuned.TuneSettings(model, targets=("q_proj",), dtype="auto", **values)


COMPILED = """
from multiprocessing.reduction import ForkingPickler
from pickle import loads
import torch
from triton.backends.compiler import GPUTarget
from lrlora_ops.kernels._configs import Tile
from lrlora_ops.tuning.calls import Call
from lrlora_ops.tuning.search import capture, fits

target = GPUTarget("cuda", 90, 32)
x, a = torch.zeros(256, 512, dtype=torch.bfloat16), torch.zeros(16, 512)
call = Call("shrink", {"x": x, "a": a, "ranks": torch.full((1,), 16, dtype=torch.int32), "max_rank": 16})
key, shapes = ("shrink", 16, 2, 256, (512,)), [loads(ForkingPickler.dumps(call.on_meta()))]  # as it gets to a process
launches = capture(target, call), capture(target, shapes[0])
assert len({launch.compiled.hash for (launch,) in launches}) == 1
shared = launches[0][0].compiled.metadata.shared
print(fits(key, shapes, target, shared, Tile(64, 128, 16, 4, 4)))
print(fits(key, shapes, target, shared - 1, Tile(64, 128, 16, 4, 4)))
print(fits(key, shapes, target, 227 << 10, Tile(32, 32, 24, 4, 2)))
"""


def test_what_does_not_fit_the_shared_memory_is_not_tried():
    """Compiled for an H200 from shapes alone, as for tensors; to a byte, and for a tile that does not compile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILED]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.stdout.split() == ["True", "False", "False"], finished.stderr


def test_seconds_are_of_tiles_that_agree_alone(monkeypatch):
    """A tile that fails or computes something else has no time; the medians of calls add up."""
    tiles = [configs.Tile(64, 64, 16, 4, stages) for stages in (2, 3, 4, 5)]
    key, pinned = ("shrink", 16, 4, 1, (4,)), []

    def results(call):
        tile = configs.tile_for("shrink", 16, torch.float32, 1, 4)
        if tile.num_stages == 4:
            raise RuntimeError("out of a resource")
        return [torch.ones(3) * (2 if tile.num_stages == 5 else 1)]

    def timer_for(call, device, pool):
        tile = configs.tile_for("shrink", 16, torch.float32, 1, 4)
        pinned.append(tile)
        return tile

    monkeypatch.setattr(Call, "results", results)
    monkeypatch.setattr(searching, "timer_for", timer_for)
    samples = lambda timers, *_: ({t: [1.0, float(t.num_stages)] for t in timers}, {})  # noqa: E731
    monkeypatch.setattr(searching, "interleave", samples)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    gpu = searching.Gpu.__new__(searching.Gpu)
    gpu.device = CPU
    infinity = float("inf")
    assert list(gpu.seconds(key, [Call("shrink", {})] * 2, tiles).values()) == [3.0, 4.0, infinity, infinity]
    assert pinned == tiles[:2] * 2
    with pytest.raises(RuntimeError, match="out of a resource"):
        gpu.seconds(key, [Call("shrink", {})], tiles[2:])
