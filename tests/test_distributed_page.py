"""docs/distributed.md: its scripts, run by its commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrlora_ops import load_adapter

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tests.test_distributed import make_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
COMMANDS = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).splitlines()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each command printed, in order, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("page")
    for script in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        (folder / script.split()[1]).write_text(script)
    make_model().save_pretrained(folder / "model")
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
    printed = []
    for command in COMMANDS:
        run = subprocess.run(command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout)
    return printed, folder


def test_launchers_agree(outputs):
    """Two processes each, one of which prints."""
    printed, folder = outputs
    ranks = [re.search(r"MULTI_\w+ 2 (\{.*\})\n", text)[1] for text in printed[:2]]
    assert ranks[0] == ranks[1] and sum(text.count("self_attn.q_proj") for text in printed[:2]) == 2 * 2
    for run in ("run-ddp", "run-accelerate"):
        adapters = load_adapter(make_model(), folder / run)
        assert str({name: found.tolist() for name, found in adapters.ranks().items()}) == ranks[0]


def test_two_processes_save_and_one_resumes(outputs):
    adapters = load_adapter(make_model(), outputs[1] / "run-dcp-adapters")
    assert adapters.policies[0].frozen and adapters.policies[0].t == 8
    assert len({int(rank) for rank in adapters.ranks().values()}) > 1
