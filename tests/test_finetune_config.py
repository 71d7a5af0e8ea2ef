"""The settings of lrlora finetune: one schema, from the methods' dataclasses, for file, options, help and JSON."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pydantic")
pytest.importorskip("typer")
from typer.testing import CliRunner

from lrlora_ops import DynamicRank, FixedRank, LearnedRank, SincUpdate
from lrlora_ops.cli import app
from lrlora_ops.finetune.config import METHOD_MODELS, METHODS, FineTuneConfig, option_paths
from lrlora_ops.finetune.config_file import read_config
from lrlora_ops.finetune.errors import CommandError

PAGE = (Path(__file__).parents[1] / "docs" / "command.md").read_text()
BASE = {"model": Path("model"), "train": [Path("text")]}


def method(**options):
    return read_config(None, BASE | {"seed": 3} | options).method_for(50)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_has_an_option_a_key_and_words(name):
    """Given as options, the settings are those of the dataclass; the help and the schema have the docstring's words."""
    made = METHODS[name]
    own = [field for field in dataclasses.fields(made) if field.name not in ("total_steps", "seed")]
    options = {path[1]: option for option, path in option_paths().items() if path[0] == "method"}
    schema = METHOD_MODELS[name].model_json_schema()["properties"]
    described = " ".join(CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output.split())
    given = {}
    for field in own:
        words = schema[field.name]["description"]
        assert words and words.split(". ")[0] in described
        assert f"--{options[field.name].replace('_', '-')} " in described
        given[options[field.name]] = field.default
    run = {"total_steps": 50, "seed": 3}
    expected = made(**{key: value for key, value in run.items() if key in {f.name for f in dataclasses.fields(made)}})
    assert method(method=name, **given) == expected


def test_settings_reach_their_method():
    assert method(method="fixed", rank=5) == FixedRank(5)
    assert method(tau=(2.0, 0.5), method_lr=0.1, lr=1.0) == LearnedRank(8.0, 32, 50, tau=(2.0, 0.5), lr=0.1, seed=3)
    assert method(mean_rank=2.5) == LearnedRank(2.5, 10, 50, seed=3)  # at most four times the mean
    grown = method(method="dynamic", interval=7, score="saliency")
    assert grown == DynamicRank(total_steps=50, interval=7, score="saliency")
    bent = method(method="sinc", rank=5, num_coefficients=3, grid=0.1, share="type")
    assert bent == SincUpdate(5, num_coefficients=3, grid=0.1, share="type")


def test_methods_by_pattern(tmp_path):
    """In order; what a run writes down of it is read again."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ntrain: [t]\nmethods:\n  experts: {name: dynamic, interval: 5}\n  all-linear: {name: learned}\n"
    )
    config = read_config(file, {})
    expected = {"experts": DynamicRank(total_steps=9, interval=5), "all-linear": LearnedRank(total_steps=9)}
    assert config.layers == list(config.method_for(9)) == list(expected)
    assert config.method_for(9) == expected and config.method_names == "DynamicRank, LearnedRank"
    file.write_text(yaml.safe_dump(config.resolved(), sort_keys=False))
    assert read_config(file, {}).method_for(9) == expected


@pytest.mark.parametrize("options, layers", [({}, ["all-linear"]), ({"method": "dynamic"}, ["experts"])])
def test_layers(options, layers):
    assert read_config(None, BASE | options).layers == layers
    assert read_config(None, BASE | options | {"targets": ["q_proj"]}).layers == ["q_proj"]


FILE = """
model: model
train: [a.jsonl, b.jsonl]
steps: 20
lr: 5e-4  # which YAML reads as a string
method:
  name: dynamic
  interval: 5
  target_rank: 12
"""


@pytest.mark.parametrize(
    "options, changed, settings",
    [
        ({}, {}, {"interval": 5, "target_rank": 12}),
        ({"steps": 30, "train": [Path("c")]}, {"steps": 30, "train": [Path("c")]}, {"interval": 5, "target_rank": 12}),
        ({"interval": 6}, {}, {"interval": 6, "target_rank": 12}),
        ({"method": "dynamic", "warmup": 0.1}, {}, {"interval": 5, "target_rank": 12, "warmup": 0.1}),
        ({"method": "learned", "warmup": 0.1}, {}, {"name": "learned", "warmup": 0.1}),  # the other one's are gone
    ],
)
def test_options_override_the_file(tmp_path, options, changed, settings):
    (tmp_path / "run.yaml").write_text(FILE)
    config = read_config(tmp_path / "run.yaml", dict.fromkeys(option_paths()) | options)
    expected = {"model": Path("model"), "train": [Path("a.jsonl"), Path("b.jsonl")], "steps": 20, "lr": 5e-4} | changed
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.method == METHOD_MODELS[settings.pop("name", "dynamic")](**settings)


def test_the_schema_is_the_files():
    """lrlora schema: what it allows and demands, and what it says is refused."""
    printed = json.loads(CliRunner().invoke(app, ["schema"]).output)
    assert printed["required"] == ["model", "train"] and printed["additionalProperties"] is False
    assert printed["properties"].keys() == FineTuneConfig.model_fields.keys()
    assert {f"{made.__name__}Settings" for made in METHODS.values()} == printed["$defs"].keys()
    assert printed["$defs"]["LearnedRankSettings"]["properties"]["freeze"]["default"] == 0.8


def test_the_page_s_file_is_read(tmp_path):
    """docs/command.md: its YAML gives the settings that it says; its exit codes are the errors'."""
    (tmp_path / "train.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    config = read_config(tmp_path / "train.yaml", {"mean_rank": 4.0})
    assert config.train == [Path("chats.jsonl")] and config.seq_len == 1024
    assert config.method_for(1000) == LearnedRank(4.0, 32, 1000, tau=(1.0, 0.3), freeze=0.7)


def test_the_page_s_methods_are_read(tmp_path):
    (tmp_path / "moe.yaml").write_text("model: m\ntrain: [t]\n" + re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    made = read_config(tmp_path / "moe.yaml", {}).method_for(500)
    assert made == {"experts": DynamicRank(total_steps=500, interval=50), "all-linear": LearnedRank(8, 32, 500)}


def test_the_page_s_mistake_is_told_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1].replace("steps: 1000", "step: 1000")
    )
    with pytest.raises(CommandError) as raised:
        read_config(Path("train.yaml"), {})
    assert f"`{raised.value}`" in PAGE


def test_exit_codes_are_the_page_s():
    from lrlora_ops.finetune import errors

    codes = {cls.code for cls in vars(errors).values() if isinstance(cls, type)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == codes | {0}
