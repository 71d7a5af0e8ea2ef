"""What is routed is what the loss depends on: padding is no demand, wherever it lies, and packed rows need none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lrlora_ops import Adapters

pytest.importorskip("transformers")
from tests._moe import adapted, tiny
from tests.test_moe_lora_mlp import CASES, DEVICE, make_layer, run

LENGTHS, WIDTH = (3, 9, 5), 12
CHATS = [torch.randint(3, 40, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
# A named activation, one of its own beside biases, and layers that are no attention beside those that are.
MODELS = ["qwen3_moe", "gpt_oss", "qwen3_next"]


def unprompted(chat: Tensor) -> Tensor:
    """Labels, but of the first token, or the padding before it would predict it."""
    return torch.cat([torch.tensor([-100]), chat[1:]])


def padded(chats: list[Tensor], left: bool) -> dict[str, Tensor]:
    """To one length, as a collator does: with a mask, and no label where nothing is."""
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for chat in chats:
        rest = (WIDTH - len(chat),)
        for name, values, filler in (
            ("input_ids", chat, 0),
            ("attention_mask", torch.ones_like(chat), 0),
            ("labels", unprompted(chat), -100),
        ):
            pad = torch.full(rest, filler)
            batch[name].append(torch.cat([pad, values] if left else [values, pad]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def packed(chats: list[Tensor]) -> dict[str, Tensor]:
    """In one row, whose positions tell where a chat begins."""
    return {
        "input_ids": torch.cat(chats)[None],
        "position_ids": torch.cat([torch.arange(len(chat)) for chat in chats])[None],
        "labels": torch.cat([unprompted(chat) for chat in chats])[None],
    }


def alone(chat: Tensor) -> dict[str, Tensor]:
    return {"input_ids": chat[None], "labels": chat[None]}


def routed(name: str, batches: list[dict[str, Tensor]], use_reentrant: bool | None = None) -> list[Tensor]:
    """Of each layer, ``[2, E]``, over one optimizer step with these micro-batches."""
    model = tiny(name).train()
    adapters: Adapters = adapted(model)
    for module in adapters.modules.values():
        for pool in module.pools().values():
            nn.init.normal_(pool.lora_B, std=0.01)  # else the rounding of one layer changes choices of the next
            nn.init.normal_(pool.lora_A, std=0.01)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    for batch in batches:
        model(**batch, use_cache=False, num_items_in_batch=torch.tensor(sum(LENGTHS))).loss.backward()
    return [table.routed.clone() for table in adapters.tables.values()]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for (counts, sums), (wanted, wanted_sums) in zip(actual, expected, strict=True):
        assert counts.tolist() == wanted.tolist()
        torch.testing.assert_close(sums, wanted_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_no_demand(name):
    """As each chat alone: in one batch, in two whose padding differs, on either side, in a packed row."""
    expected = routed(name, [alone(chat) for chat in CHATS])
    # Each token goes to two experts; a chat's last one predicts nothing, and no other attends to it.
    assert all(int(counts.sum()) == 2 * sum(n - 1 for n in LENGTHS) for counts, _ in expected)
    for left in (False, True) if name != "qwen3_next" else (False,):
        assert_equal(routed(name, [padded(CHATS, left)]), expected)
        assert_equal(routed(name, [padded(CHATS[:2], left), padded(CHATS[2:], left)]), expected)
    if name == "qwen3_moe":
        assert_equal(routed(name, [packed(CHATS)]), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_padding_is_no_demand_where_activations_are_recomputed(use_reentrant):
    expected = routed("qwen3_moe", [alone(chat) for chat in CHATS])
    assert_equal(routed("qwen3_moe", [padded(CHATS, True)], use_reentrant), expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_tokens_without_a_gradient(backend):
    """They are not counted; a NaN is a gradient."""
    layer = make_layer(replace(CASES["silu by name"], tokens=5), DEVICE[backend])
    leaves = {name: t.detach().clone().nan_to_num().requires_grad_() for name, t in layer.leaves.items()}
    num_experts = layer.table.num_experts
    silent = torch.arange(len(layer.dy), device=layer.dy.device) % 3 == 1
    dy = layer.dy.nan_to_num().masked_fill(silent[:, None], 0.0)
    dy[0, 0] = torch.nan
    demand = torch.zeros(2, num_experts, device=dy.device, requires_grad=True)
    y = run(layer, leaves, backend=backend, demand=demand)
    (found,) = torch.autograd.grad(y, [demand], dy)
    expected = torch.zeros(num_experts + 1, 2, dtype=torch.float64, device=dy.device)
    chosen, weights = layer.index[~silent].flatten(), leaves["weights"].detach()[~silent].flatten()
    expected.index_add_(0, chosen.long(), torch.stack([torch.ones_like(weights), weights], 1).double())
    assert found[0].tolist() == expected[:-1, 0].tolist()
    torch.testing.assert_close(found[1].double(), expected[:-1, 1], rtol=1e-5, atol=1e-5)
