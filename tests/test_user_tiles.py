"""The tiles that lrlora tune keeps for a GPU: read back, refused if they are of something else, never half written."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import warnings
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

configs = importlib.import_module("lrlora_ops.kernels._configs")
user_tiles = importlib.import_module("lrlora_ops.kernels._user_tiles")

DEVICE, BF16 = "A GPU", torch.bfloat16
SHRINK = ("shrink", 16, 2, 512, (4096,))
TILES = {
    SHRINK: (128, 64, 16, 8, 3),
    ("expand", 64, 2, 1024, (512,)): (64, 64, 32, 4, 2),
    ("grouped_gemm", 1, 2, 256, (2048, 1536)): (128, 256, 64, 8, 3),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The identity of a machine with a GPU, whose cache is in a folder of the test."""
    monkeypatch.setenv(user_tiles.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "device_name", lambda: DEVICE)
    forget()
    yield user_tiles.Identity.here()
    monkeypatch.undo()
    forget()


def forget():
    configs.user_tiles.cache_clear()
    configs.measured.cache_clear()


def refused():
    """The warning for tiles that are there and not used."""
    forget()
    with pytest.warns(UserWarning) as caught:
        assert configs.user_tiles() == {}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.tile_for("shrink", 16, BF16, 600, 4096) == configs.CONFIGS["cuda", 2]["shrink"][16]
    return str(caught[0].message)


def test_what_is_kept_is_what_the_launchers_take(here):
    user_tiles.save(DEVICE, here, TILES)
    assert user_tiles.load(DEVICE, here) == TILES
    assert configs.tile_for("shrink", 16, BF16, 600, 4096) == configs.Tile(128, 64, 16, 8, 3)
    assert configs.gemm_tile(300, BF16, 2048, 1536) == configs.Tile(128, 256, 64, 8, 3)
    shipped = configs.CONFIGS["cuda", 2]
    for other in (
        configs.tile_for("shrink", 16, BF16, 600, 4095),  # another width
        configs.tile_for("shrink", 16, BF16, 400, 4096),  # fewer rows of an expert
        configs.tile_for("shrink", 16, BF16, 1024, 4096),  # more
    ):
        assert other == shipped["shrink"][16]
    assert configs.tile_for("shrink", 32, BF16, 600, 4096) == shipped["shrink"][32]
    assert configs.tile_for("shrink", 16, torch.float32, 600, 4096) == configs.CONFIGS["cuda", 4]["shrink"][16]
    many = [configs.tile_for("expand", 64, BF16, rows, 512).block_n for rows in (1023, 1024, 1 << 20)]
    assert many == [shipped["expand"][64].block_n, 64, 64] != [64, 64, 64]
    assert configs.tables_in_use() == "3 of lrlora tune, then shipped"


def test_every_shipped_tile_can_be_kept(here):
    """On AMD some have two warps."""
    for (_, itemsize), table in configs.CONFIGS.items():
        tiles = {(name, r, itemsize, 1, ()): astuple(tile) for name, own in table.items() for r, tile in own.items()}
        user_tiles.save(DEVICE, here, tiles)
        assert tiles.items() <= user_tiles.load(DEVICE, here).items()


def test_own_tiles_go_before_measured_ones_before_shipped_ones(here, monkeypatch):
    monkeypatch.setattr(configs, "MEASURED", {DEVICE: {SHRINK[:3]: (32, 32, 16, 4, 2)}})
    user_tiles.save(DEVICE, here, TILES)
    assert configs.tile_for("shrink", 16, BF16, 512, 4096).block_m == 128
    assert configs.tile_for("shrink", 16, BF16, 512, 2048).block_m == 32
    assert configs.tile_for("gram", 16, BF16, 512, 2048) == configs.CONFIGS["cuda", 2]["gram"][16]
    assert configs.tables_in_use() == "3 of lrlora tune, then 1 measured on this kind of GPU, then shipped"


@pytest.mark.parametrize("name", ["torch", "triton", "kernels"])
def test_tiles_of_another_version_or_source_are_not_used(here, name):
    user_tiles.save(DEVICE, replace(here, **{name: "0.1"}), TILES)
    message = refused()
    assert ("another source of the kernels" if name == "kernels" else f"{name} 0.1, and here is ") in message
    assert "run lrlora tune MODEL again, or remove" in message and str(user_tiles.path()) in message
    assert "those of lrlora tune are not used: they are of" in configs.tables_in_use()
    assert str(user_tiles.path().parent) not in configs.tables_in_use()


def test_another_device_has_no_tiles(here, monkeypatch):
    user_tiles.save(DEVICE, here, TILES)
    monkeypatch.setattr(configs, "device_name", lambda: "Another")
    assert configs.user_tiles() == {} == user_tiles.load("Another", here)
    user_tiles.save("Another", here, {SHRINK: (64, 64, 16, 4, 2)})
    assert user_tiles.load(DEVICE, here) == TILES


def test_environments_keep_their_own_and_old_ones_go(here):
    identities = [replace(here, torch=str(version)) for version in range(6)]
    for identity in identities:
        user_tiles.save(DEVICE, identity, TILES)
    user_tiles.save(DEVICE, identities[3], {SHRINK: (64, 64, 16, 4, 2)})
    changed = TILES | {SHRINK: (64, 64, 16, 4, 2)}
    assert [user_tiles.load(DEVICE, identity) for identity in identities[2:]] == [TILES, changed, TILES, TILES]
    for gone in identities[:2]:
        with pytest.raises(user_tiles.UnusableTiles, match=r"of torch 3, and here is"):
            user_tiles.load(DEVICE, gone)


def test_a_change_of_a_kernel_changes_the_hash(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(Path(user_tiles.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    hashes = {user_tiles.source_hash(), user_tiles.source_hash(folder)}
    assert len(hashes) == 1
    (folder / "_measured.py").write_text("MEASURED = {}")  # a table of tiles is no kernel
    assert user_tiles.source_hash(folder) in hashes
    for name in ("shrink.py", "_tiles.py"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        hashes.add(user_tiles.source_hash(folder))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],  # a disk that was full
        lambda text: "[]",
        lambda text: text.replace('"shrink"', "7"),
        lambda text: text.replace('"tiles"', '"other"'),
        lambda text: text.replace("128,", "96,"),  # no power of two
        lambda text: text.replace('"capacity": 64', '"capacity": 16'),  # a step beyond the width of U
        lambda text: json.dumps({DEVICE: 3}),
    ],
)
def test_a_damaged_file_is_said_once_and_replaced(here, damage):
    user_tiles.save(DEVICE, here, TILES)
    whole = user_tiles.path().read_text()
    user_tiles.path().write_text(damage(whole))
    assert "they are damaged" in refused() or "they cannot be read" in refused()
    user_tiles.save(DEVICE, here, TILES)
    assert user_tiles.path().read_text() == whole


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_kill_while_writing_leaves_the_old_file(here, monkeypatch, function):
    user_tiles.save(DEVICE, here, TILES)
    monkeypatch.setattr(os, function, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        user_tiles.save(DEVICE, here, {SHRINK: (64, 64, 16, 4, 2)})
    assert user_tiles.load(DEVICE, here) == TILES
    assert {path.name for path in user_tiles.path().parent.iterdir()} == {"tiles.json", "tiles.lock"}


def add_shapes(worker, here):
    for width in range(10):
        user_tiles.save(DEVICE, here, {("shrink", 16, 2, 512, (worker, width)): (64, 64, 16, 4, 2)})


def test_processes_that_tune_at_once_lose_nothing(here):
    """A training run that reads meanwhile sees whole files."""
    fork = multiprocessing.get_context("fork")  # imports nothing anew
    workers = [fork.Process(target=add_shapes, args=(worker, here)) for worker in range(3)]
    for worker in workers:
        worker.start()
    seen = [0]
    while any(worker.is_alive() for worker in workers):
        seen.append(len(user_tiles.load(DEVICE, here)))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert seen == sorted(seen)
    expected = {("shrink", 16, 2, 512, (worker, width)) for worker in range(3) for width in range(10)}
    assert set(user_tiles.load(DEVICE, here)) == expected


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv(user_tiles.VARIABLE, str(tmp_path))
    assert user_tiles.path() == tmp_path / "tiles.json"
    monkeypatch.delenv(user_tiles.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_tiles.path() == tmp_path / "lrlora_ops" / "tiles.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_tiles.path() == tmp_path / ".cache" / "lrlora_ops" / "tiles.json"


def test_without_a_gpu_no_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv(user_tiles.VARIABLE, str(tmp_path))
    (tmp_path / "tiles.json").write_text("{")
    monkeypatch.setattr(configs, "device_name", lambda: "")
    forget()
    assert configs.user_tiles() == {}
    assert configs.tables_in_use() == "shipped; there is no GPU"
    forget()
