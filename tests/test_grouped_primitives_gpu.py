"""The compiled base product and combine at the sizes of real MoE layers, in bf16 above all."""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
import torch

from tests._oracle import assert_within_budget, bits
from tests.test_grouped_primitives import GemmCase, GemmInputs, check_gemm, check_gemm_with_low_rank, make_gemm
from tests.test_primitives_gpu import GROUPED, inputs_for, zipf

ops = importlib.import_module("lrlora_ops.kernels.primitives")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = {
    "OLMoE up, Zipf": GemmCase(32768, 2048, 2048, group_sizes=zipf(32768, 64), tokens=4096),
    "OLMoE down, Zipf": GemmCase(32768, 1024, 2048, group_sizes=zipf(32768, 64)),
    "Qwen3 up, even": GemmCase(32768, 2048, 1536, group_sizes=(256,) * 128, tokens=4096),
    "Qwen3 up, decoding": GemmCase(64, 2048, 1536, group_sizes=(1, 0) * 64, tokens=8),
    "Mixtral down, one hot expert": GemmCase(8192, 14336, 4096, group_sizes=(0, 96, 8000, 0, 0, 95, 0, 0)),
    "1B attention, ragged rows": GemmCase(8191, 2048, 2048),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_grouped_gemm(case, transposed, dtype):
    inputs = make_gemm(case, dtype, "cuda")
    check_gemm(ops, inputs, transposed, biased=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPED.values(), ids=GROUPED.keys())
def test_grouped_gemm_with_a_low_rank_product(case, dtype):
    check_gemm_with_low_rank(ops, case, inputs_for(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "num_cols"), [(8192, 8, 2048), (4095, 2, 4096), (3, 8, 2880)])
def test_combine(num_tokens, top_k, num_cols, dtype):
    rows = torch.randn(num_tokens * top_k, num_cols, device="cuda").to(dtype)
    positions = torch.randperm(len(rows), device="cuda").view(num_tokens, top_k)
    weights = torch.rand(num_tokens, top_k, device="cuda")
    exact, plain = (
        torch.einsum("tk,tkn->tn", weights.to(compute), rows[positions].to(compute))
        for compute in (torch.float64, torch.float32)
    )
    assert_within_budget(ops.combine(rows, positions, weights), exact, plain)


def test_equal_runs_without_a_host_sync():
    inputs = make_gemm(CASES["OLMoE up, Zipf"], torch.bfloat16, "cuda")
    positions = torch.arange(inputs.offsets[-1] // 8 * 8, device="cuda").view(-1, 8)

    def run(inputs: GemmInputs) -> list[bytes]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = ops.grouped_gemm(inputs.x, inputs.weight, inputs.bias, **inputs.routing())
            out = ops.combine(y, positions)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return list(bits((y, out)))

    assert run(inputs) == run(inputs)


def test_graph_follows_the_routing():
    """A captured graph computes whatever groups the tensor holds at replay."""
    inputs = make_gemm(CASES["Qwen3 up, even"], torch.bfloat16, "cuda")
    assert inputs.group_offsets is not None

    def run() -> torch.Tensor:
        return ops.grouped_gemm(inputs.x, inputs.weight, **inputs.routing())

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for sizes in ((512, 0) * 64, (0,) * 127 + (32768,), (3,) * 128):
        ends = torch.tensor(sizes, device="cuda").cumsum(0)
        inputs.group_offsets[1:] = ends
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, run())
        assert all((end > first) == bool(captured[first:end].any()) for first, end in pairwise([0, *ends.tolist()]))
        assert not captured[int(ends[-1]) :].any()
