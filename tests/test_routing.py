"""Routing.from_topk against a loop over tokens, its edges, its errors, and what it may not do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrlora_ops.routing import Routing

DTYPES = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


def slow_routing(choices, num_experts):
    """Token, position and offsets, expert by expert and token by token; dropped pairs at the end."""
    pairs = [
        (token, token * len(row) + choice)
        for expert in range(num_experts + 1)
        for token, row in enumerate(choices)
        for choice, chosen in enumerate(row)
        if chosen == expert
    ]
    chosen = [expert for row in choices for expert in row]
    offsets = [sum(expert < bound for expert in chosen) for bound in range(num_experts + 1)]
    return [token for token, _ in pairs], [position for _, position in pairs], offsets


def check(top_k_index, num_experts, routing):
    tokens, order, offsets = slow_routing(top_k_index.tolist(), num_experts)
    assert routing.token_index.tolist() == tokens and routing.token_index.dtype == torch.int64
    assert routing.row_order.tolist() == order and routing.row_order.dtype == torch.int64
    assert routing.group_offsets.tolist() == offsets and routing.group_offsets.dtype == torch.int32
    assert routing.row_position.shape == top_k_index.shape and routing.row_position.dtype == torch.int64
    inverse = routing.row_position.flatten()[routing.row_order]
    assert inverse.tolist() == list(range(top_k_index.numel()))


@st.composite
def cases(draw):
    num_experts, tokens, top_k = draw(st.integers(1, 12)), draw(st.integers(0, 20)), draw(st.integers(1, 4))
    chosen = draw(st.lists(st.integers(0, num_experts), min_size=tokens * top_k, max_size=tokens * top_k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(chosen, dtype=dtype).view(tokens, top_k), num_experts


@settings(max_examples=300)
@given(cases())
def test_routing_is_what_the_loop_says(case):
    check(*case, Routing.from_topk(*case))


@DTYPES
@pytest.mark.parametrize(
    "choices, num_experts",
    [
        ([[2, 0], [1, 2], [2, 1]], 3),
        ([[1], [0], [1], [1]], 2),  # one choice per token
        ([[5, 5], [5, 5]], 8),  # all to one expert, neighbours empty
        ([[3, 1], [3, 3]], 3),  # dropped pairs, a token that is dropped whole
        ([[1, 1], [1, 1]], 1),  # everything dropped
        ([[0], [1], [2], [3]], 300),  # more experts than rows
    ],
)
def test_edges(choices, num_experts, dtype):
    top_k_index = torch.tensor(choices, dtype=dtype)
    check(top_k_index, num_experts, Routing.from_topk(top_k_index, num_experts))


@DTYPES
@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_nothing_to_route(shape, dtype):
    routing = Routing.from_topk(torch.empty(shape, dtype=dtype), 4)
    assert routing.token_index.shape == routing.row_order.shape == (0,)
    assert routing.row_position.shape == shape and routing.group_offsets.tolist() == [0] * 5


@DTYPES
def test_the_order_within_an_expert_is_stable(dtype):
    """4,000 rows for three experts: a sort that is not stable would mix them up."""
    top_k_index = torch.randint(0, 3, (1000, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    routing = Routing.from_topk(top_k_index, 3)
    for start, end in zip(routing.group_offsets[:-1], routing.group_offsets[1:], strict=True):
        assert routing.row_order[start:end].diff().gt(0).all() and routing.token_index[start:end].diff().ge(0).all()


def test_rows_find_their_tokens_and_back():
    """What the ops do with it: gather rows by token, and combine them by position."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    top_k_index = torch.randint(0, 7, (50, 2), generator=generator)
    routing = Routing.from_topk(top_k_index, 6)
    rows = x[routing.token_index] * weights.flatten()[routing.row_order, None]
    combined = rows[routing.row_position].sum(1)
    torch.testing.assert_close(combined, x * weights.sum(1, keepdim=True), rtol=1e-12, atol=0)
    experts = top_k_index.flatten()[routing.row_order]
    sizes = routing.group_offsets.diff()
    assert torch.equal(experts[: routing.group_offsets[-1]], torch.arange(6).repeat_interleave(sizes))
    assert experts[routing.group_offsets[-1] :].eq(6).all()


def test_choices_that_are_not_contiguous():
    top_k_index = torch.randint(0, 5, (4, 9), generator=torch.Generator().manual_seed(0)).t()
    check(top_k_index, 4, Routing.from_topk(top_k_index, 4))


@DTYPES
def test_compiles_as_one_graph_for_any_number_of_tokens(dtype):
    compiled = torch.compile(Routing.from_topk, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 8, 31):
        top_k_index = torch.randint(0, 5, (tokens, 2), generator=generator).to(dtype)
        check(top_k_index, 4, compiled(top_k_index, 4))


def test_reads_no_value_on_the_host():
    """On the meta device there are no values to read."""
    routing = Routing.from_topk(torch.empty(6, 2, dtype=torch.int64, device="meta"), 4)
    assert routing.row_position.shape == (6, 2) and routing.group_offsets.shape == (5,)


@pytest.mark.gpu
@DTYPES
def test_never_waits_for_the_gpu_and_can_be_captured(dtype):
    generator = torch.Generator().manual_seed(0)
    choices = [torch.randint(0, 65, (512, 8), generator=generator).to(dtype) for _ in range(2)]
    static = choices[0].cuda()
    Routing.from_topk(static, 64)  # allocates what the sort needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        Routing.from_topk(static, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = Routing.from_topk(static, 64)
    for top_k_index in choices:
        static.copy_(top_k_index)
        graph.replay()
        check(top_k_index, 64, routing)
