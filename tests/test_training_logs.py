"""Ranks and budget where a loop logs: ``metrics()``, the trainer's history and bar, TensorBoard and W&B."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from lrlora_ops import FixedRank, LearnedRank, apply_lora
from tests._models import ALL, Model

transformers = pytest.importorskip("transformers")
from tests._training import adapted, trainer  # noqa: E402

NAMES = [f"lrlora/{name}" for name in ("rank_mean", "rank_min", "rank_max", "rank_sum", "budget")]


def test_a_handful_of_numbers():
    """Over layers and experts alike, and the mean of each kind of layer, whatever the number of layers."""
    model = Model()
    adapters = apply_lora(model, {"*q_proj": FixedRank(5), "*": FixedRank(2)}, ALL)
    model.layers[1].mlp["up"].set_rank(0)
    assert adapters.metrics() == {
        "lrlora/rank_mean": 2.5,
        "lrlora/rank_min": 0,
        "lrlora/rank_max": 5,
        "lrlora/rank_sum": 20,
        "lrlora/budget": 22,
        "lrlora/rank_mean/q_proj": 5,
        "lrlora/rank_mean/k_proj": 2,
        "lrlora/rank_mean/up": 1,
        "lrlora/rank_mean/down": 2,
    }
    adapters.merge()
    assert adapters.metrics() == {}


def test_one_kind_of_layer_and_no_budget():
    """Numbers are no kind, and a price per component sets no budget."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = apply_lora(model, LearnedRank(3, 6, penalty=1e-3), ["0", "1"])
    assert list(adapters.metrics()) == [*NAMES[:4], "lrlora/rank_mean/0", "lrlora/rank_mean/1"]
    block = nn.ModuleDict({"block": model})
    assert list(apply_lora(block, LearnedRank(3, 6)).metrics()) == NAMES


def test_ranks_go_where_the_trainer_logs(tmp_path, monkeypatch, capsys):
    """TensorBoard comes before all callbacks of a user, and the history holds a copy of the logs; both have them."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model, adapters = adapted("grown experts, learned layers")
    settings = {"logging_strategy": "steps", "logging_steps": 2, "report_to": ["tensorboard"], "disable_tqdm": False}
    run = trainer(model, adapters, tmp_path, **settings)
    run.train()
    written = events.EventAccumulator(str(tmp_path / "board"))
    written.Reload()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == 5
    for name in (*NAMES, "lrlora/rank_mean/experts", "lrlora/rank_mean/q_proj"):
        assert [(e.step, e.value) for e in written.Scalars(f"train/{name}")] == [
            (row["step"], pytest.approx(row[name])) for row in rows
        ]
    sums = [row["lrlora/rank_sum"] for row in rows]
    assert sums[0] < sums[-1] == rows[-1]["lrlora/budget"]
    assert sum("experts" in tag or "layers" in tag for tag in written.Tags()["scalars"]) == 1
    assert "'lrlora/rank_mean': " in capsys.readouterr().out


def records(path: Path) -> Iterator[bytes]:
    """Those of a W&B run's file, a log as LevelDB writes it: blocks of 32 KiB, in which records lie whole or in parts.

    The file begins with 7 bytes of its own, a part with 7 of checksum, length and place: whole, first, middle, last.
    """
    data, at, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := -at % 2**15) and left < 7:
            at += left
        _, size, place = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if place in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow  # starts W&B's service
def test_ranks_go_to_wandb(tmp_path, monkeypatch):
    """Offline, into the file that ``wandb sync`` would send."""
    wandb = pytest.importorskip("wandb")
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name, value in {"MODE": "offline", "DIR": tmp_path, "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    model, adapters = adapted("learned")
    run = trainer(model, adapters, tmp_path, logging_strategy="steps", logging_steps=2, report_to=["wandb"])
    run.train()
    wandb.finish()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = []
    for record in map(internal.Record.FromString, records(path)):
        items = record.history.item
        written.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == 5
    names = (*NAMES, "lrlora/rank_mean/q_proj", "loss")
    assert [
        {name: row[f"train/{name}"] for name in names} | {"step": row["train/global_step"]}
        for row in written
        if "train/loss" in row
    ] == [{name: row[name] for name in (*names, "step")} for row in rows]


def test_ranks_are_read_only_when_something_is_logged(tmp_path, monkeypatch):
    """Reading them waits for the device."""
    model, adapters = adapted("learned")
    read = []
    monkeypatch.setattr(adapters, "metrics", lambda: read.append(1) or {})
    trainer(model, adapters, tmp_path, logging_strategy="steps", logging_steps=5).train()
    assert len(read) == 2
