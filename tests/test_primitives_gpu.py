"""The compiled kernels at the sizes of real models, in bf16 above all, which no interpreter can check."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests._oracle import SCALING, Case, bits, make_inputs
from tests.test_primitives import check_all, check_expand

ops = importlib.import_module("lrlora_ops.kernels.primitives")
padded_rank = importlib.import_module("lrlora_ops.kernels._tiles").padded_rank

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DENSE = {
    "1B attention": Case((16,), 16, rows=8192, in_features=2048, out_features=2048),
    "1B MLP, far below capacity": Case((11,), 64, rows=8192, in_features=2048, out_features=8192),
    "8B attention": Case((32,), 32, rows=8192, in_features=4096, out_features=4096),
    "8B attention, ragged rows": Case((128,), 128, rows=8191, in_features=4096, out_features=4096),
    "8B MLP, two rank tiles": Case((200,), 256, rows=4096, in_features=4096, out_features=14336),
    "70B attention, decoding": Case((16,), 16, rows=3, in_features=8192, out_features=8192),
}


def zipf(rows: int, num_experts: int) -> tuple[int, ...]:
    """Rows of each expert, falling as 1 / n; rounding leaves some rows to no expert."""
    weights = [1 / (n + 1) for n in range(num_experts)]
    return tuple(int(rows * weight / sum(weights)) for weight in weights)


GROUPED = {
    "OLMoE up, Zipf, ranks 4 and 64": Case(
        (4, 64) * 32, 64, 32768, 2048, 2048, group_sizes=zipf(32768, 64), gather=True
    ),
    "Qwen3 down, even": Case((16,) * 128, 16, 32768, 768, 2048, group_sizes=(256,) * 128),
    "Mixtral up, one hot expert": Case((8, 0) * 4, 32, 8192, 4096, 14336, group_sizes=(0, 96, 8000, 0, 0, 96, 0, 0)),
}


def inputs_for(case: Case, dtype: torch.dtype, **options):
    return make_inputs(case, dtype, padded_rank(case.max_rank), device="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*DENSE.values(), *GROUPED.values()], ids=[*DENSE, *GROUPED])
def test_parity(case, dtype):
    inputs = inputs_for(case, dtype)
    check_all(ops, inputs, case.max_rank, dtype)
    check_expand(ops, inputs, None, False, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_parity_with_adapters_in_fp32(dtype):
    case = DENSE["8B attention"]
    inputs = inputs_for(case, dtype, adapter_dtype=torch.float32)
    check_all(ops, inputs, case.max_rank, dtype)
    check_expand(ops, inputs, inputs.base.float(), True, dtype)


@pytest.mark.parametrize(
    "case", [DENSE["1B attention"], GROUPED["OLMoE up, Zipf, ranks 4 and 64"]], ids=["dense", "MoE"]
)
def test_equal_runs_without_a_host_sync(case):
    def run() -> list[bytes]:
        scaled = (inputs.ranks, SCALING, inputs.gate)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = (
                ops.shrink(inputs.x, inputs.a, inputs.ranks, case.max_rank, **table, row_index=inputs.row_index),
                ops.expand(inputs.u, inputs.b, *scaled, **table, base=inputs.base),
                ops.gram(
                    inputs.u,
                    inputs.x,
                    inputs.ranks,
                    len(inputs.a),
                    SCALING,
                    inputs.a.dtype,
                    inputs.gate,
                    **table,
                    row_index=inputs.row_index,
                ),
                *ops.shrink_gram(inputs.dy, inputs.b, inputs.u, *scaled, **table),
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return list(bits(results))

    inputs = inputs_for(case, torch.bfloat16)
    table = inputs.table()
    assert run() == run()


def test_graph_follows_the_rank():
    """A captured graph computes whatever rank the tensor holds at replay, up and down."""
    case = DENSE["1B attention"]
    inputs = inputs_for(case, torch.bfloat16)

    def run() -> torch.Tensor:
        u = ops.shrink(inputs.x, inputs.a, inputs.ranks, case.max_rank)
        return ops.expand(u, inputs.b, inputs.ranks, SCALING, inputs.gate, base=inputs.base)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for rank in (3, 0, 16):
        inputs.ranks.fill_(rank)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, run()), f"replay at rank {rank} differs"


def test_past_2_31_elements():
    """The last rows of a tensor of 2^31 elements and more; all others are zero, and whole numbers sum exactly."""
    tail, columns = 64, 4096
    rows = 2**31 // columns + tail
    free = torch.cuda.mem_get_info()[0]
    if free < 8 * rows * columns:
        pytest.skip(f"needs {8 * rows * columns >> 30} GiB of GPU memory, {free >> 30} GiB are free")
    inputs = inputs_for(Case((5,), 16, tail, columns, columns), torch.bfloat16)
    inputs.use_whole_numbers()
    far_y, far_u = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda"), inputs.u.new_zeros(rows, 16)
    far_y[-tail:], far_u[-tail:] = inputs.x, inputs.u

    far = ops.shrink(far_y, inputs.a, inputs.ranks, 16)
    assert torch.equal(far[-tail:], ops.shrink(inputs.x, inputs.a, inputs.ranks, 16))
    gram = (inputs.ranks, len(inputs.a), SCALING, torch.bfloat16)
    assert torch.equal(ops.gram(far_u, far_y, *gram), ops.gram(inputs.u, inputs.x, *gram))
    v, d_b, c = ops.shrink_gram(far_y, inputs.b, far_u, inputs.ranks, SCALING)
    for far, near in zip(
        (v[-tail:], d_b, c), ops.shrink_gram(inputs.x, inputs.b, inputs.u, inputs.ranks, SCALING), strict=True
    ):
        assert torch.equal(far, near)
    far_y[:-tail] = 0
    far = ops.expand(far_u, inputs.b, inputs.ranks, SCALING, base=far_y)
    assert torch.equal(far[-tail:], ops.expand(inputs.u, inputs.b, inputs.ranks, SCALING, base=inputs.x))
    assert not far[:-tail].any()
