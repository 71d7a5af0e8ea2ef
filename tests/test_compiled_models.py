"""torch.compile of whole adapted models: one graph for a run whose ranks change ten times, and the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lrlora_ops import Adapters, DynamicRank, LearnedRank, apply_lora

transformers = pytest.importorskip("transformers")
from tests._moe import tiny  # noqa: E402
from tests._training import ids, llama  # noqa: E402

CHANGES = 10
LEARNED = LearnedRank(3, 6, total_steps=2 * CHANGES, lr=0.5)
GROWN = DynamicRank(initial_rank=1, target_rank=3, max_rank=8, interval=1, warmup=0, total_steps=CHANGES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def train(model: nn.Module, forward, adapters: Adapters) -> tuple[list[Tensor], list[list[int]]]:
    """The losses and the ranks of a run with CHANGES optimizer steps; a recompilation after the first is an error."""
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3, weight_decay=0)
    model.train()
    losses, ranks = [], []
    for step in range(CHANGES):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = forward(input_ids=ids(), labels=ids(), use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        ranks.append([rank for table in adapters.tables.values() for rank in table.train_ranks.tolist()])
        adapters.step()
        optimizer.step()
        optimizer.zero_grad()
    return losses, ranks


def assert_compiles_once(model: nn.Module, methods, backend: str = "aot_eager") -> None:
    """To one graph, forward and backward; the run equals the uncompiled one."""
    plain = copy.deepcopy(model)
    runs = []
    for own in (model, plain):
        torch.manual_seed(1)
        adapters = apply_lora(own, methods)
        for parameter in adapters.parameters():
            nn.init.normal_(parameter, std=0.1)
        compiled = torch.compile(own, fullgraph=True, backend=backend) if own is model else own
        runs.append(train(own, compiled, adapters))
    assert counters["stats"]["unique_graphs"] == 1
    (losses, ranks), (expected, expected_ranks) = runs
    assert ranks == expected_ranks and len({tuple(row) for row in ranks}) == CHANGES
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_experts():
    """Grown, with layers beside them whose ranks are learned."""
    assert_compiles_once(tiny("qwen3_moe"), {"experts": GROWN, "all-linear": LEARNED})


def test_a_dense_model():
    assert_compiles_once(llama(), {"all-linear": LEARNED})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [("mixtral", "aot_eager"), ("mixtral", "inductor"), ("qwen3_moe", "inductor"), ("llama", "inductor")],
)
def test_every_kind_of_model(name, backend):
    """With the code that inductor generates, too, of a layer: a further one has the same."""
    if name == "llama":
        assert_compiles_once(llama(num_hidden_layers=1), {"all-linear": LEARNED}, backend)
    else:
        assert_compiles_once(tiny(name, num_hidden_layers=1), {"experts": GROWN, "all-linear": LEARNED}, backend)
