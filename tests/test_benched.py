"""lrlora bench on layers of one's own: a model's, and shapes; who is not here is said, and so is what cannot be."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="needs peft, as the benchmarks do")
pytest.importorskip("typer")
from typer.testing import CliRunner

from benchmarks import own, race, session
from benchmarks.floors import Machine, lora_cost
from benchmarks.providers import MODES
from benchmarks.shapes import ExpertsShape, Shape
from lrlora_ops.cli import app
from lrlora_ops.finetune import benched
from lrlora_ops.plan import Layer
from tests._cli import assert_one_line

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MACHINE = Machine("any", bandwidth=1e9, flops=1e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def run(*words):
    return CliRunner().invoke(app, ["bench", *words])


def test_a_models_layers_and_shapes(model, monkeypatch):
    """One layer of each size: everybody who agrees with the oracle is timed, with the floor; the absent are named."""
    monkeypatch.setattr(race, "_SECONDS", {"cpu": dict.fromkeys(MODES, 0.0)})
    monkeypatch.setattr(session, "probe", lambda *_: MACHINE)
    monkeypatch.setitem(own._DENSE, "cpu", ("PEFT", "LoRAFusion"))
    monkeypatch.setitem(own._EXPERTS, "cpu", ("PEFT", "axolotl"))
    monkeypatch.delenv("LRLORA_PEERS", raising=False)
    layers = ("--targets", "q_proj", "--targets", "experts", "--shape", "9,8,7", "--experts", "5,4,2,8,16")
    result = run(model, *layers, "--tokens", "10", "--rank", "3", "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "4 layers on cpu" in result.output
    for title in (
        "small q_proj 10x24x24 fp32 r3",
        "small 10 tokens 3e top2 24/16, uniform ranks fp32 r3",
        "own linear 9x8x7 fp32 r3",
        "own 5 tokens 4e top2 8/16, uniform ranks fp32 r3",
    ):
        for mode in ("forward", "forward+backward"):
            (block,) = (b for b in result.output.split("\n\n") if b.startswith(f"{title}, {mode}\n"))
            assert [line.split()[0] for line in block.splitlines()[2:]] == ["base", "lrlora", "PEFT"]
    floor = lora_cost(Shape("", "", 9, 8, 7), 3, 4, 4).floor_ms(MACHINE)
    block = result.output.partition("own linear 9x8x7 fp32 r3, forward+backward\n")[2]
    assert f"{floor:.3g}" in next(line for line in block.splitlines() if line.startswith("lrlora")).split()
    assert "LoRAFusion: set LRLORA_LORAFUSION" in result.output
    assert "axolotl: set LRLORA_AXOLOTL" in result.output


def test_an_installed_package_has_no_benchmarks(monkeypatch, tmp_path):
    monkeypatch.setattr(benched, "__file__", str(tmp_path / "site-packages" / "lrlora_ops" / "finetune" / "benched.py"))
    for words in (["--shape", "8,8,8"], ["--table"], []):
        assert_one_line(run(*words), "part of the source tree, not of the installed package; in a checkout of it, pip")


def test_the_suite_gets_what_is_for_pytest(monkeypatch, tmp_path):
    commands = []

    def record(command, cwd):
        commands.append(command[2:])
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr(benched.subprocess, "run", record)
    monkeypatch.chdir(tmp_path)
    assert [run(*words).exit_code for words in ((), ("-k", "dense"), ("--table", "a.json"))] == [7, 7, 7]
    suite = ["pytest", "benchmarks/", "--benchmark-only"]
    assert commands == [suite, [*suite, "-k", "dense"], ["benchmarks.report", str(tmp_path / "a.json")]]


def test_layers_as_the_suite_wants_them():
    linear = Layer("model.layers.0.q_proj", 1, ((24, 12),), 9, 9, 4, 0)
    gated = Layer("model.layers.0.experts", 3, ((24, 32), (16, 24)), 9, 18, 4, 0)
    plain = Layer("model.layers.0.experts", 3, ((24, 16), (16, 24)), 9, 18, 4, 0)
    assert own.shape_of("m", linear) == Shape("m", "q_proj", 9, 24, 12)
    assert own.shape_of("m", gated) == ExpertsShape("m", 9, 3, 2, 24, 16)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.experts: its experts have no gate"):
        own.shape_of("m", plain)


def test_ranks_of_experts_are_those_asked_for():
    shape = ExpertsShape("m", 9, 3, 2, 24, 16)
    case = own.case_of(shape, 5, torch.float32, torch.device("cpu"))
    assert (case.expert_ranks, case.max_rank, case.mean_rank) == ([5, 5, 5], 5, 5)
    assert str(case) == "m 9 tokens 3e top2 24/16, uniform ranks fp32"
