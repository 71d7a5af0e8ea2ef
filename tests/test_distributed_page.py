"""docs/distributed.md: its scripts, run by its commands."""

import re

import pytest

from lrlora_ops import load_adapter
from tests import _pages

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
from tests import _chat  # noqa: E402

pytestmark = pytest.mark.slow  # seven processes that import everything


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each command printed, in order, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("page")
    _pages.write_files("distributed", folder)
    (folder / "train.py").write_text(_pages.blocks("training", "python")[0].code)
    _chat.save_chat_model(folder / "model")
    _chat.save_chats(folder / "chats.jsonl")
    return _pages.run_commands(_pages.commands("distributed"), folder), folder


def saved(outputs, run):
    """The adapters that a run saved, in one process."""
    folder = outputs[1]
    return load_adapter(transformers.AutoModelForCausalLM.from_pretrained(folder / "model"), folder / run)


def test_launchers_agree(outputs):
    """Two processes each, one of which prints."""
    ranks = [re.search(r"MULTI_\w+ 2 (\{.*\})\n", text)[1] for text in outputs[0][:2]]
    assert ranks[0] == ranks[1] and all(text.count("layers.0.self_attn.q_proj") == 1 for text in outputs[0][:2])
    for run in ("run-ddp", "run-accelerate"):
        assert str({name: found.tolist() for name, found in saved(outputs, run).ranks().items()}) == ranks[0]


def test_a_trainer(outputs):
    """Both processes tell the same ranks, and the checkpoint has them."""
    totals = re.findall(r"total of \d+ +(\d+) ", outputs[0][2])
    assert len(totals) == 2 * 2 and len(set(totals)) == 1, "each process prints its summary twice"
    checkpoint = max((outputs[1] / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    adapters = saved(outputs, checkpoint)
    ranks = adapters.ranks()
    assert int(totals[0]) == sum(int(ranks[n].sum()) * len(m.pools()) for n, m in adapters.modules.items())


def test_two_processes_save_and_one_resumes(outputs):
    adapters = saved(outputs, "run-dcp-adapters")
    assert adapters.policies[0].frozen and adapters.policies[0].t == 8
    assert len({int(rank) for rank in adapters.ranks().values()}) > 1
