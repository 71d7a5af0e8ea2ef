"""The documentation says what is: its code runs, its links lead somewhere, and no page is left out.

The Python blocks of a page run in order, in one process and one namespace, in a new folder. Pages whose blocks are
files for commands have tests of their own: ``test_distributed_page.py`` and ``test_extending_page.py``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import lrlora_ops
from lrlora_ops import Adapters, FixedRank, apply_lora
from lrlora_ops.integrations import sglang_export, vllm_export
from tests._pages import PAGES, ROOT, blocks, commands

transformers = pytest.importorskip("transformers")
from tests._moe import ids, tiny  # noqa: E402

Scope = dict[str, Any]


def trained(name: str) -> Adapters:
    adapters = apply_lora(tiny(name), FixedRank(2), "all-linear")
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapters


def names() -> Scope:
    """What pages of fragments leave out: the imports."""
    return {name: getattr(lrlora_ops, name) for name in lrlora_ops.__all__} | {"torch": torch, "lrlora_ops": lrlora_ops}


def readme() -> Scope:
    adapters = trained("qwen3_moe")
    if not Path("path").exists():
        tiny("qwen3_moe").save_pretrained("path")
        adapters.export("a-lora-of-peft")
    args = transformers.TrainingArguments("run", use_cpu=not torch.cuda.is_available(), report_to=[])
    return names() | {"path": "path", "args": args, "data": [], "adapters": adapters, "model": tiny("qwen3_moe")}


def methods() -> Scope:
    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    return names() | {"model": tiny("qwen3_moe"), "batches": [ids()] * 2, "loss": loss}


def training() -> Scope:
    pytest.importorskip("trl")
    from tests import _chat

    _chat.save_chat_model(Path("model"))
    _chat.save_chats(Path("chats.jsonl"))
    return {}


def each_loop_trains(scope: Scope) -> None:
    """Every adapter, and their ranks differ at the end."""
    adapters = scope["adapters"]
    assert all(pool.lora_B.any() for module in adapters.modules.values() for pool in module.pools().values())
    assert all(policy.frozen for policy in adapters.policies)
    assert len({int(rank) for ranks in adapters.ranks().values() for rank in ranks.flatten()}) > 1


def budgets_are_spent(scope: Scope) -> None:
    """Once the ranks are final they sum to what the methods say."""
    for policy in scope["adapters"].policies if "adapters" in scope else ():
        if policy.frozen and hasattr(policy, "tables"):
            assert sum(int(table.ranks.sum()) for table in policy.tables.values()) == policy.budget


def updates_are_seen(scope: Scope) -> None:
    """Or the page would compare base models."""
    plain, trained = scope["base"]()(scope["tokens"]).logits, scope["trained"]
    assert (plain - trained).norm() > 0.1 * trained.norm()


# What a page takes for granted; a page of fragments gets it anew for each block.
GIVEN: dict[str, Callable[[], Scope]] = {
    "README": readme,
    "methods": methods,
    "sinc": methods,
    "command": lambda: {"adapters": trained("llama"), "tokens": ids()},
    "training": training,
}
FRAGMENTS = {"README", "methods", "sinc"}
RUN_BY_COMMANDS = {"distributed", "extending"}
# What shall hold after each block of a page.
HOLDS: dict[str, Callable[[Scope], None]] = {
    "training": each_loop_trains,
    "formats": updates_are_seen,
    **dict.fromkeys(("index", "custom-model", "moe"), budgets_are_spent),
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in RUN_BY_COMMANDS])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = GIVEN.get(page, dict)
    scope = given()
    for index, block in enumerate(blocks(page, "python")):
        if page in FRAGMENTS and index:
            scope = given()
        block.run(scope)
        HOLDS.get(page, lambda scope: None)(scope)


def test_commands_are_run():
    """A console block is something that a test runs; what only shows a command is text."""
    assert {page for page in PAGES if commands(page)} == RUN_BY_COMMANDS


def test_servers_page_has_every_family():
    rows = re.findall(r"^\| ([\w, ]+) \|(.*)\|(.*)\|$", PAGES["formats"].read_text(), re.MULTILINE)
    for column, module in enumerate((vllm_export, sglang_export), start=1):
        listed = {family for row in rows if row[column].strip() for family in row[0].split(", ")}
        assert listed >= set(module.FAMILIES), module.SERVER.name
        assert module.SERVER.name in PAGES["formats"].read_text()


def test_api_page_has_every_public_name():
    listed = re.findall(r"^::: lrlora_ops\.(?:ops\.\w+\.)?(\w+)$", PAGES["api"].read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lrlora_ops.__all__)


def test_site_has_every_page():
    listed = re.findall(r'= "(\w[\w-]*)\.md"', (ROOT / "zensical.toml").read_text())
    assert sorted(listed) == sorted(set(PAGES) - {"README"})


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]|\]\(.*?\)|\[", "", heading)).lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Within the repository, and from the site's pages to the site's pages."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert page.parent == ROOT or page.parent in linked.parents, f"{target} is not part of the site"
        assert not anchor or anchor in anchors(linked), target


def test_a_paper_has_one_number():
    """Nothing outside can be asked here: a link leads where its text says, and methods.md has all papers."""
    sources = [path.read_text() for folder in ("lrlora_ops", "kernels") for path in (ROOT / folder).rglob("*.py")]
    pages = {name: path.read_text() for name, path in PAGES.items()}
    numbers = {name: set(re.findall(r"\d{4}\.\d{5}", text)) for name, text in pages.items()}
    for text in pages.values():
        for said, target in re.findall(r"\[arXiv (\S+)\]\((\S+?)\)", text):
            assert target == f"https://arxiv.org/abs/{said}"
    assert len(numbers["methods"]) == 3
    for found in (*numbers.values(), *(set(re.findall(r"arXiv:? ?(\d{4}\.\d{5})", text)) for text in sources)):
        assert found <= numbers["methods"]
