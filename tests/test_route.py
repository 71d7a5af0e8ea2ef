"""The routing kernels against PyTorch's sort: any shares, any experts, indices that are nobody's, equal runs."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrlora_ops import Routing
from tests.test_primitives_contract import DEVICES

route_module = importlib.import_module("lrlora_ops.kernels.route")
DEVICE = DEVICES["triton"]

pytestmark = pytest.mark.usefixtures("poison")


def random_choices(tokens: int, top_k: int, num_experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """With dropped pairs among them."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(num_experts + 1, (tokens, top_k), generator=generator).to(DEVICE, dtype)


def check(top_k_index: Tensor, num_experts: int) -> None:
    expected = Routing.from_topk(top_k_index, num_experts, backend="eager")
    actual = Routing.from_topk(top_k_index, num_experts, backend="triton")
    for name, value in vars(expected).items():
        assert getattr(actual, name).dtype == value.dtype
        assert torch.equal(getattr(actual, name), value), name


@settings(max_examples=25)
@given(st.data())
def test_any_choices(data):
    num_experts, tokens, top_k = (data.draw(st.integers(low, high)) for low, high in ((1, 12), (0, 20), (1, 4)))
    size = tokens * top_k
    chosen = data.draw(st.lists(st.integers(0, num_experts), min_size=size, max_size=size))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    check(torch.tensor(chosen, dtype=dtype, device=DEVICE).view(tokens, top_k), num_experts)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "programs"),
    [
        (1, 1, 1, 128),  # Triton specialises on 1
        (32, 2, 3, 128),  # one full block
        (65, 1, 2, 128),  # a second program of a single pair
        (150, 4, 5, 2),  # two programs of several blocks, the last one not full
        (300, 2, 512, 128),  # ten shares, whose counts are read four at a time
        (260, 2, 3000, 128),  # counts of one share at a time
        (6, 3, 255, 128),  # a power of two with the dropped ones
        (6, 3, 256, 128),
        (0, 2, 4, 128),
        (3, 0, 4, 128),
    ],
)
def test_shares(tokens, top_k, num_experts, programs, monkeypatch):
    monkeypatch.setattr(route_module, "_MOST_PROGRAMS", programs)
    check(random_choices(tokens, top_k, num_experts), num_experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_nobody_are_dropped(dtype):
    """What a CPU refuses, a GPU cannot see: it must not write anywhere else."""
    outside = torch.iinfo(dtype)
    top_k_index = torch.tensor([[2, -1], [outside.max, 0], [5, outside.min], [1, 4]], dtype=dtype, device=DEVICE)
    routing = Routing.from_topk(top_k_index, 4, backend="triton")
    assert routing.group_offsets.tolist() == [0, 1, 2, 3, 3]
    assert routing.row_order.tolist() == [3, 6, 0, 1, 2, 4, 5, 7]
    assert routing.token_index.tolist() == [1, 3, 0, 0, 1, 2, 2, 3]
    assert routing.row_position.flatten()[routing.row_order].tolist() == list(range(8))


def test_choices_of_any_layout():
    check(random_choices(4, 9, 5).t(), 5)


def test_opcheck():
    torch.library.opcheck(route_module.route, (random_choices(9, 2, 4, torch.int32), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8192, 2**20])
def test_real_sizes(tokens):
    for num_experts in (8, 128, 512):
        check(random_choices(tokens, 8, num_experts), num_experts)
