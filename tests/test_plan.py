"""lrlora plan: its numbers by hand, against what adapters really hold on the meta device, and as a command."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import nn

from benchmarks.floors import base_cost, lora_cost, sinc_cost, sinc_passes_cost
from benchmarks.memory import peak_bytes
from benchmarks.shapes import ExpertsShape, ProjectionShape, Shape
from lrlora_ops import DynamicRank, FixedRank, LearnedRank, SincUpdate, apply_lora
from lrlora_ops._storage import saved_bytes
from lrlora_ops._targets import find_targets
from lrlora_ops.plan import Cost, Gpu, Held, Layer, largest_rank, learning, owned, owned_at, peft, sinc

pytest.importorskip("transformers")
pytest.importorskip("typer")
import transformers
from typer.testing import CliRunner

from lrlora_ops._trace import trace
from lrlora_ops.cli import app
from lrlora_ops.finetune.gpus import known_gpu
from lrlora_ops.finetune.planned import advice

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOKENS = 20


def on_meta(experts=False, dtype=torch.bfloat16):
    config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS) if experts else transformers.LlamaConfig(**SIZES)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def traced(targets, experts=False, dtype=torch.bfloat16):
    model = on_meta(experts, dtype)
    return trace(model, find_targets(model, targets), TOKENS)


def counted(model, parameters, base=None) -> Held:
    """What a step really holds of these parameters, and saves beyond the base model; tables' small tensors apart."""
    model.train()
    x = torch.empty(1, TOKENS, 64, dtype=model.dtype, device="meta", requires_grad=True)
    small = [t for m in model.modules() if hasattr(m, "train_ranks") for t in (m.gate, m.demand, m.train_ranks)]
    outputs = []
    with patch.object(torch, "autocast", lambda *_, **__: nullcontext()):  # PEFT switches off what meta has not
        forward = lambda: outputs.append(model(inputs_embeds=x).logits)  # noqa: E731
        saved = saved_bytes(forward, [*model.parameters(), *model.buffers(), *small])
        if parameters:
            outputs[0].sum().backward()
    optimizer = torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(1))])
    optimizer.step()
    moments = [v for values in optimizer.state.values() for v in values.values() if v.dim()]
    sizes = [sum(t.nbytes for t in tensors) for tensors in (parameters, [p.grad for p in parameters], moments)]
    return Held(*sizes, saved - (base.saved if base else 0))


@cache
def base_of(experts=False, dtype=torch.bfloat16) -> Held:
    return counted(on_meta(experts, dtype).requires_grad_(False), [])


LAYER = Layer("q", 1, ((4096, 1024),), 8192, 8192, 2, 0)
MIXTURE = Layer("experts", 64, ((2048, 2048), (1024, 2048)), 512, 4096, 2, 0)


def test_a_linear_layer_by_hand():
    """Rank 16 of 4096 -> 1024 on 8192 tokens in bf16."""
    held = owned([LAYER], 16, 64)
    assert (held.adapters, held.gradients, held.optimizer) == (4 * 81_920, 4 * 81_920, 8 * 81_920)
    assert held.saved == 2 * 8192 * 4096 + 2 * 8192 * 16
    assert learning([LAYER], 16, 64).saved == 2 * 8192 * 4096 + 2 * 8192 * 64
    assert learning([LAYER], 16, 64).adapters == 4 * held.adapters
    assert peft([LAYER], 16, 64).saved == 4 * 8192 * (4096 + 16)
    assert held.total == 16 * 81_920 + held.saved


def test_experts_by_hand():
    """16 components each for 64 experts of 2048/1024, top 8, on 512 tokens."""
    held = owned([MIXTURE], 16, 64)
    assert held.adapters == 4 * 64 * 16 * (2048 + 2048 + 1024 + 2048)
    assert held.saved == 2 * 2 * 4096 * 64
    assert peft([MIXTURE], 16, 64).saved == 2 * (64 * 3 * 2048 * 1024 + 4096 * 3072 + 64 * 16 * 7168)


def test_a_sinc_update_by_hand():
    """Nine coefficients for each projection; the largest weight in bf16, and fp32 sums of dA and dB, once for all."""
    held = sinc([LAYER, MIXTURE], 16, 64)
    parameters = 16 * (4096 + 1024) + 64 * 16 * (2048 + 2048 + 1024 + 2048) + 3 * 9
    assert (held.adapters, held.gradients, held.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert held.saved == 2 * 8192 * 4096
    assert held.buffer == 64 * (2 * 2048 * 2048 + 4 * 16 * 2048 * (2048 // 64 + 2048 // 512))
    assert held.total == 16 * parameters + held.saved + held.buffer
    alone = sinc([LAYER, LAYER], 100, 100).buffer  # 128 slots
    assert alone == 2 * 4096 * 1024 + 4 * 128 * (4096 * 1024 // 64 + 1024 * 4096 // 512)
    assert sinc([], 16, 64).total == 0


def test_ranks_that_differ_by_layer_are_held_layer_by_layer():
    held = owned_at([LAYER, MIXTURE], [16, 2.5], [99, 7])
    alone = owned([LAYER], 16, 99)
    assert held.adapters == held.gradients == alone.adapters + 4 * 64 * 2.5 * 7168
    assert held.saved == alone.saved + 2 * 2 * 4096 * 7  # a column for each component that an expert may get


def test_a_sinc_update_on_some_layers_alone():
    """They share inputs with the others; the buffer is theirs."""
    held, plain = (owned_at([LAYER, MIXTURE], [16, 2.5], [99, 7], own) for own in ({MIXTURE.name: 5}, {}))
    assert held.adapters == held.gradients == held.optimizer / 2 == plain.adapters + 2 * 5 * 4
    assert held.saved == plain.saved - MIXTURE.u_bytes(7)
    assert (held.buffer, plain.buffer) == (sinc([MIXTURE], 2.5, 7).buffer, 0)


def assert_costs(found: Cost, moved: int, flops: int) -> None:
    assert (found.bytes, found.flops) == (moved, flops)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 16])
def test_floors_of_a_linear_layer_by_hand(rank, backward):
    m, k, n = 8192, 4096, 1024
    products = 2 if backward else 1
    base = (products * 2 * (m * k + k * n + m * n), products * 2 * m * k * n)
    moved = 2 * m * k + m * n + 6 * m * rank if backward else m * k + 2 * m * rank
    lora = [2 * moved, 3 * 2 * m * rank * (k + n) if backward else 2 * m * rank * (k + n)]
    uses = 3 if backward else 1
    shape = Shape("8B", "k_proj", m, k, n)
    assert_costs(LAYER.base_cost(backward), *base)
    assert_costs(base_cost(shape, backward=backward), *base)
    for adapter in (2, 4):
        expected = (lora[0] + uses * adapter * rank * (k + n), lora[1]) if rank else (0, 0)
        assert_costs(LAYER.lora_cost(rank, backward, adapter), *expected)
        assert_costs(lora_cost(shape, rank, adapter_itemsize=adapter, backward=backward), *expected)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 16])
def test_floors_of_experts_by_hand(rank, backward):
    t, rows, k, n, e = 512, 4096, 2048, 1024, 64
    products, uses, widths = 2 if backward else 1, 3 if backward else 1, (k + 2 * n) + (n + k)
    base = (products * 2 * (e * 3 * k * n + t * k + rows * 3 * n + rows * k), products * 2 * rows * 3 * k * n)
    moved = 3 * t * k + rows * 4 * n + 12 * rows * rank if backward else t * k + rows * n + 4 * rows * rank
    shape = ExpertsShape("OLMoE", t, e, 8, k, n)
    assert_costs(MIXTURE.base_cost(backward), *base)
    assert_costs(base_cost(shape, backward=backward), *base)
    for adapter in (2, 4):
        expected = (2 * moved + uses * adapter * e * rank * widths, uses * 2 * rows * rank * widths)
        assert_costs(MIXTURE.lora_cost(rank, backward, adapter), *(expected if rank else (0, 0)))
        found = lora_cost(shape, rank, adapter_itemsize=adapter, backward=backward)
        assert_costs(found, *(expected if rank else (0, 0)))


def test_floors_of_one_projection_of_experts_by_hand():
    shape = ProjectionShape(40, 4, 24, 16)
    assert_costs(base_cost(shape), 2 * 2 * (40 * (24 + 16) + 4 * 24 * 16), 2 * 2 * 40 * 24 * 16)
    moved = 2 * (2 * 40 * 24 + 40 * 16 + 6 * 40 * 8) + 3 * 2 * 4 * 8 * (24 + 16)
    assert_costs(lora_cost(shape, 8), moved, 6 * 40 * 8 * (24 + 16))


def test_what_peft_moves_on_top_by_hand():
    ours, theirs = LAYER.lora_cost(16), LAYER.peft_cost(16)
    assert theirs.bytes - ours.bytes == 2 * 8192 * (4 * 4096 + 4 * 1024)  # dx and y: written, read; read and written
    assert theirs.flops == ours.flops
    ours, theirs, weights = MIXTURE.lora_cost(16), MIXTURE.peft_cost(16), 3 * 2048 * 1024
    assert theirs.bytes - ours.bytes == 4 * 2 * 64 * weights
    assert theirs.flops - ours.flops == 2 * 4096 * weights + 6 * 64 * 16 * weights


@pytest.mark.parametrize("rank", [0, 1, 16])
def test_what_a_sinc_update_adds_by_hand(rank):
    """A product as large as the forward's, five passes over the weight, four products of the rank."""
    m, k, n = 8192, 4096, 1024
    product, passes = (2 * (m * k + m * n + k * n), 2 * m * k * n), (2 * 5 * k * n, 4 * 2 * rank * k * n)
    assert_costs(LAYER.sinc_product_cost(), *product)
    assert_costs(LAYER.sinc_passes_cost(rank), *passes)
    assert_costs(LAYER.sinc_passes_cost(rank, backward=False), 2 * 2 * k * n, 2 * rank * k * n)
    shape = Shape("8B", "k_proj", m, k, n)
    assert_costs(sinc_passes_cost(shape, rank), *passes)
    assert_costs(sinc_cost(shape, rank), product[0] + passes[0], product[1] + passes[1])


def test_what_a_sinc_update_of_experts_adds_by_hand():
    """Tokens are read and written outside of the projections, routed rows between them."""
    t, rows, k, n, e = 512, 4096, 2048, 1024, 64
    moved = t * k + rows * 2 * n + rows * n + t * k + e * 3 * k * n
    assert_costs(MIXTURE.sinc_product_cost(), 2 * moved, 2 * rows * 3 * k * n)
    assert_costs(MIXTURE.sinc_passes_cost(16), 2 * 5 * e * 3 * k * n, 4 * 2 * 16 * e * 3 * k * n)


def test_milliseconds_are_the_longer_of_both():
    assert Cost(2e9, 1e12).milliseconds(Gpu(1e12, 1e15)) == 2.0
    assert Cost(2e9, 4e12).milliseconds(Gpu(1e12, 1e15)) == 4.0


@pytest.mark.parametrize("targets", ["o_proj", ["q_proj", "k_proj"], "all-linear"])
def test_linear_layers_hold_what_is_planned(targets):
    """Bit for bit what apply_lora's adapters hold, inputs shared or not."""
    layers, base = traced(targets).layers, base_of()
    model = on_meta()
    fixed = counted(model, apply_lora(model, FixedRank(5), targets).parameters(), base)
    assert fixed == owned(layers, 5, 7)
    model = on_meta()
    learned = counted(model, apply_lora(model, LearnedRank(5, 7), targets).parameters(), base)
    assert learned == learning(layers, 5, 7)


def test_a_sinc_update_holds_what_is_planned():
    """But for the coefficients in units of z, which are 36 bytes for each of 14 layers."""
    layers, base, model = traced("all-linear").layers, base_of(), on_meta()
    held = counted(model, apply_lora(model, SincUpdate(5), "all-linear").parameters(), base)
    assert held == replace(sinc(layers, 5, 7), saved=sinc(layers, 5, 7).saved + 14 * 9 * 4, buffer=0)


def test_a_sinc_update_of_experts_holds_no_more_than_is_planned():
    layers, base, model = traced("experts", experts=True).layers, base_of(experts=True), on_meta(experts=True)
    held = counted(model, apply_lora(model, SincUpdate(3), "experts").parameters(), base)
    plan = sinc(layers, 3, 3)
    assert (held.adapters, held.gradients, held.optimizer) == (plan.adapters, plan.gradients, plan.optimizer)
    indices = 8 * (2 * 2 * TOKENS * 4 + 4 * 6 + 8)  # as below
    assert held.saved <= indices


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize(
    "rank, dtype",
    [(5, torch.bfloat16), (64, torch.bfloat16), (130, torch.bfloat16), (32, torch.float32), (64, torch.float32)],
)
def test_the_buffer_is_what_a_backward_pass_allocates(rank, dtype, experts, monkeypatch):
    """Of weights 1024 x 512 and a row for each expert; the kernels themselves are left out."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from lrlora_ops.ops._backends import launcher

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    n, k = 1024, 512
    x, dy = torch.ones(experts, k, dtype=dtype), torch.ones(experts, n, dtype=dtype)
    a, b, weight = torch.ones(experts * rank, k), torch.ones(experts * rank, n), dy.new_ones(experts, n, k)
    offsets = torch.arange(experts + 1, dtype=torch.int32) if experts > 1 else None
    given = (dy, x, weight, False, offsets, None, None, None, a, b, torch.ones(9), 0.1, 1.0, dtype, True, True)
    found = peak_bytes(lambda: launcher("sinc_gemm_backward")(*given), torch.device("cpu"))
    planned = Layer("", experts, ((k, n),), experts, experts, dtype.itemsize, 0).sinc_buffer_bytes(rank)
    results = a.nbytes + b.nbytes
    assert planned <= found - results <= 1.02 * planned


def test_experts_hold_no_more_than_is_planned():
    layers, base, model = traced("experts", experts=True).layers, base_of(experts=True), on_meta(experts=True)
    held = counted(model, apply_lora(model, DynamicRank(2, 3, 6), "experts").parameters(), base)
    plan = owned(layers, 3, 6)
    assert (held.adapters, held.gradients, held.optimizer) == (plan.adapters, plan.gradients, plan.optimizer)
    indices = 8 * (2 * 2 * TOKENS * 4 + 4 * 6 + 8)  # of rows and components, two layers, 64 bits at most
    assert held.saved <= plan.saved + indices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peft_holds_what_is_planned(dtype):
    library = pytest.importorskip("peft")
    layers, base = traced(["q_proj", "k_proj", "down_proj"], dtype=dtype).layers, base_of(dtype=dtype)
    model = on_meta(dtype=dtype)
    library.get_peft_model(model, library.LoraConfig(r=5, target_modules=["q_proj", "k_proj", "down_proj"]))
    assert counted(model, [p for p in model.parameters() if p.requires_grad], base) == peft(layers, 5, 7)


def test_peft_on_experts_holds_what_is_planned():
    library = pytest.importorskip("peft")
    layers, base, model = traced("experts", experts=True).layers, base_of(experts=True), on_meta(experts=True)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    library.get_peft_model(model, library.LoraConfig(r=5, target_modules=[], target_parameters=names))
    held = counted(model, [p for p in model.parameters() if p.requires_grad], base)
    assert held == peft(layers, 5, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_experts_in_any_dtype(dtype):
    """What is traced on the meta device is what a forward on the CPU keeps."""
    model = on_meta(experts=True, dtype=dtype)
    model.set_attn_implementation("eager")  # fused attention is another one on each device
    found = trace(model, find_targets(model, "experts"), TOKENS)
    model = model.to_empty(device="cpu")
    resident = [*model.parameters(), *model.buffers()]
    for tensor in resident:
        tensor.zero_()
    x = torch.zeros(1, TOKENS, 64, dtype=dtype, requires_grad=True)
    is_attention = lambda tensor: tensor.dim() > 2 and tensor.shape[-2:] == (TOKENS, TOKENS)  # noqa: E731
    kept = saved_bytes(lambda: model(inputs_embeds=x), resident, is_attention)
    assert found.layers[0].itemsize == dtype.itemsize
    offsets = 2 * 4 * 4  # of the experts' rows in two layers: not counted where they go with no grouped_mm
    assert found.saved == kept - (offsets if dtype != torch.bfloat16 else 0)


def test_the_frozen_model():
    """Its weights by counting; what it saves grows with the tokens, without their square."""
    found, model = traced("all-linear"), on_meta()
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.logits == TOKENS * 100 * (2 + 8)
    long = trace(model, find_targets(model, "q_proj"), 100 * TOKENS)
    assert long.saved == pytest.approx(100 * found.saved, rel=0.01)


def test_layers_that_the_forward_does_not_call():
    model = on_meta()
    with pytest.raises(ValueError, match="does not call vision; leave it out of targets"):
        trace(model, {"vision": nn.Linear(2, 2)}, TOKENS)


@pytest.mark.parametrize("limit", [-1, 0, 1, 6, 7, 8, 99])
def test_largest_rank(limit):
    assert largest_rank(lambda rank: rank <= limit, 8) == min(limit, 8)


@pytest.mark.parametrize(
    "name, bandwidth",
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA GH200 480GB", 4.0e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA L40S", 0.864e12),
        ("NVIDIA L4", 0.3e12),
        ("NVIDIA L40", 0.864e12),  # no L4
        ("NVIDIA GB200", 8.0e12),  # no B200
        ("NVIDIA B200", 7.7e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A10G", 0.6e12),  # no A100
        ("NVIDIA GeForce RTX 3090 Ti", 1.008e12),
        ("AMD Instinct MI300X", 5.3e12),
        ("AMD Instinct MI250X / MI250", 1.6e12),  # one of two devices
    ],
)
def test_gpus_are_known_by_a_part_of_their_name(name, bandwidth):
    assert known_gpu(name).bandwidth == bandwidth


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"]
)
def test_what_shares_a_name_with_a_gpu_is_unknown(name):
    assert known_gpu(name) is None


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A config.json, and no weights."""
    folder = tmp_path_factory.mktemp("config")
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", **SIZES, **EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)], terminal_width=200)


def test_command(directory):
    result = run(directory, "--budget", "2", "--tokens", "20", "--targets", "experts", "--gpu-memory", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    words = " ".join(result.output.split())
    assert "computed, not measured: 20 tokens in a step, mean rank 2, at most 8" in words
    parameters = 2 * 4 * 2 * (64 + 64 + 32 + 64)
    assert f"model.layers.*.mlp.experts 2 {parameters:,}" in words
    most = "FixedRank(32), DynamicRank with max_rank 32; or LearnedRank with max_rank 32"  # the layers' own rank
    assert f"1 GB hold, beside the model and with a tenth to spare: {most}" in words


def test_the_ranks_that_fit_a_memory():
    """One component more than is advised does not fit."""
    found = traced("all-linear", dtype=torch.float32)
    beside = found.weights + found.saved + found.logits
    memory = (beside + learning(found.layers, 9, 9).total + 1) / 0.9e9
    assert "FixedRank(9); or LearnedRank with max_rank 9, of which a mean_rank of 2" in advice(found, memory)
    assert "FixedRank(8); or LearnedRank with max_rank 8" in advice(found, memory - 2e-9 / 0.9)


def test_memory_that_does_not_hold_the_model(directory):
    result = run(directory, "--budget", "2", "--gpu-memory", "0.0001")
    assert "0.0001 GB do not hold the model and a step of it: lower --tokens" in " ".join(result.output.split())
