"""docs/command.md: its plan, run on its config."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
from typer.testing import CliRunner

from lrlora_ops.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "command.md").read_text()


def test_the_plan_is_the_page_s(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    words = ["plan", "model", "--budget", "16", "--gpu-memory", "24", "--gpu"]
    assert f'`lrlora {" ".join(words)} "RTX 4090"`' in PAGE
    result = CliRunner().invoke(app, [*words, "RTX 4090"], env={"COLUMNS": "110"})
    assert result.exit_code == 0, (result.output, result.exception)
    printed = "\n".join(line.rstrip() for line in result.output.splitlines())
    assert f"```text\n{printed}\n```" in PAGE
