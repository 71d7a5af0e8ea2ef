"""Calls of the public API that are refused: the call, the exception, what the message says, and the fix it names."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from lrlora_ops import (
    DynamicRank,
    FixedRank,
    LearnedRank,
    RankTable,
    Routing,
    VariableRankLoRAGroupedLinear,
    VariableRankLoRALinear,
    apply_lora,
    grouped_lora_linear,
    load_adapter,
    lora_linear,
)
from lrlora_ops.doctor import examine
from tests._models import IDS, Model

INT32, DOUBLE = torch.int32, torch.float64
FROZEN = torch.zeros(4, 5)
TRAINED = torch.zeros(4, 5, requires_grad=True)
FREEZE = r"freeze it with (weight|bias).requires_grad_\(False\), or .* pass it as base"
RANGE = "it must be from 0 to 3, the rows of lora_A"
MOVE = r"move one of them with .to\(\)"
ONE_OF = "it must be one of .*float32"


def linear(**changes):
    """lora_linear with K 5, N 4 and 3 rows."""
    good = {"x": torch.zeros(2, 5), "lora_A": torch.zeros(3, 5), "lora_B": torch.zeros(3, 4)}
    return lora_linear(**good | changes)


LINEAR = [
    (
        lambda: linear(x=torch.zeros(2, 6)),
        r"x has shape \(2, 6\) and lora_A \(3, 5\)",
        "must be equal.*one row a component",
    ),
    (lambda: linear(x=torch.zeros(())), r"x has shape \(\) and lora_A", "must be equal"),
    (lambda: linear(x=torch.zeros(2, 5, dtype=torch.int64)), "x is torch.int64", ONE_OF),
    (lambda: linear(lora_A=torch.zeros(3, 5, dtype=torch.float8_e4m3fn)), "lora_A is torch.float8_e4m3fn", ONE_OF),
    (lambda: linear(lora_B=torch.zeros(3, 4, dtype=torch.complex64)), "lora_B is torch.complex64", ONE_OF),
    (lambda: linear(lora_A=torch.zeros(5)), r"lora_A has shape \(5,\)", r"it must be \[pool rows, features\]"),
    (
        lambda: linear(lora_B=torch.zeros(1, 3, 4)),
        r"lora_B has shape \(1, 3, 4\)",
        r"it must be \[pool rows, features\]",
    ),
    (lambda: linear(lora_B=torch.zeros(4, 3)), "lora_A has 3 rows and lora_B 4", "the transpose of PEFT's"),
    (lambda: linear(gate=torch.ones(2)), r"gate has shape \(2,\)", r"it must be \(3,\)"),
    (lambda: linear(gate=torch.ones(3, dtype=torch.bfloat16)), "gate is torch.bfloat16", r"use gate.float\(\)"),
    (lambda: linear(rank=4), "rank is 4", RANGE),
    (lambda: linear(rank=-1), "rank is -1", RANGE),
    (lambda: linear(rank=2.0), "rank is 2.0", "it must be an integer, an int32 tensor of one element, or None"),
    (
        lambda: linear(rank=torch.tensor(2)),
        r"rank is a torch.int64 tensor of shape \(\)",
        "must hold one int32: torch.tensor",
    ),
    (
        lambda: linear(rank=torch.tensor([2, 2], dtype=INT32)),
        r"a torch.int32 tensor of shape \(2,\)",
        "must hold one int32",
    ),
    (lambda: linear(rank=torch.tensor(4, dtype=INT32)), "rank is 4", RANGE),  # read where that is free
    (lambda: linear(rank=torch.tensor([-1], dtype=INT32)), "rank is -1", RANGE),
    (lambda: linear(rank=torch.tensor(1, dtype=INT32, device="meta")), "rank is on meta but x is on cpu", MOVE),
    (lambda: linear(weight=torch.zeros(5, 4)), r"weight has shape \(5, 4\)", r"it must be \(4, 5\)"),
    (
        lambda: linear(weight=FROZEN.half()),
        "weight is torch.float16 but x is torch.float32",
        "cast one, or run under torch.auto",
    ),
    (lambda: linear(weight=TRAINED), "weight requires a gradient", FREEZE),
    (lambda: linear(weight=FROZEN.to("meta")), "weight is on meta but x is on cpu", MOVE),
    (lambda: linear(weight=FROZEN, bias=TRAINED[:, 0]), "bias requires a gradient", FREEZE),
    (lambda: linear(weight=FROZEN, bias=torch.zeros(5)), r"bias has shape \(5,\)", r"it must be \(4,\)"),
    (
        lambda: linear(weight=FROZEN, bias=FROZEN[:, 0].double()),
        "bias is torch.float64 but x is torch.float32",
        "cast one",
    ),
    (lambda: linear(bias=torch.zeros(4)), "bias is given without weight", "add it to base instead"),
    (
        lambda: linear(weight=FROZEN, base=torch.zeros(2, 4)),
        "both weight and base are given",
        "give weight .*, or base",
    ),
    (lambda: linear(base=torch.zeros(4)), r"base has shape \(4,\)", r"it must be \(2, 4\)"),
    (lambda: linear(base=torch.zeros(2, 4, dtype=torch.int8)), "base is torch.int8", ONE_OF),
    (lambda: linear(base=torch.zeros(2, 4, device="meta")), "base is on meta but x is on cpu", MOVE),
    (lambda: linear(gate=torch.ones(3, device="meta")), "gate is on meta but x is on cpu", MOVE),
    (lambda: linear(dropout=1.0), "dropout is 1.0", "it must be at least 0 and below 1"),
    (lambda: linear(dropout=-0.1), "dropout is -0.1", "it must be at least 0 and below 1"),
    (lambda: linear(dropout=math.nan), "dropout is nan", "it must be at least 0 and below 1"),
    (lambda: linear(backend="cuda"), "backend is 'cuda'", r"one of \('triton', 'eager', 'reference'\), or None"),
    (
        lambda: linear(backend="reference", dropout=0.5),
        "backend 'reference' has no dropout",
        "apply it to x of the update",
    ),
]


def grouped(**changes):
    """grouped_lora_linear with 2 experts of rank 3, 8 rows, K 4 and N 3."""
    good = {
        "x": torch.zeros(8, 4),
        "lora_A": torch.zeros(6, 4),
        "lora_B": torch.zeros(6, 3),
        "group_offsets": torch.tensor([0, 3, 8], dtype=INT32),
        "table": RankTable.uniform(2, 3),
    }
    return grouped_lora_linear(**good | changes)


def offsets(*values, dtype=INT32):
    return {"group_offsets": torch.tensor(values, dtype=dtype)}


W = torch.zeros(2, 3, 4)
GROUPED = [
    (
        lambda: grouped(x=torch.zeros(1, 8, 4)),
        r"x has shape \(1, 8, 4\)",
        r"it must be \[rows sorted by expert, in_features\]",
    ),
    (lambda: grouped(x=torch.zeros(8, 5)), r"x has shape \(8, 5\)", "last dimensions must be equal"),
    (lambda: grouped(x=torch.zeros(8, 4, dtype=INT32)), "x is torch.int32", ONE_OF),
    (
        lambda: grouped(**offsets(0, 3, 8, dtype=torch.int64)),
        "is torch.int64",
        r"must be int32 \[3\].*Routing.from_topk",
    ),
    (lambda: grouped(**offsets(0, 8)), r"group_offsets is torch.int32 of shape \(2,\)", r"must be int32 \[3\]"),
    (lambda: grouped(**offsets(1, 3, 8)), r"group_offsets is \[1, 3, 8\]", "it must start with 0"),
    (lambda: grouped(**offsets(0, 9, 8)), r"group_offsets is \[0, 9, 8\]", "never decrease"),
    (lambda: grouped(**offsets(0, 3, 9)), r"group_offsets is \[0, 3, 9\]", "end within the 8 rows of x"),
    (
        lambda: grouped(lora_A=torch.zeros(5, 4), lora_B=torch.zeros(5, 3)),
        "has 5 rows, but the table hands out 6",
        "equal",
    ),
    (lambda: grouped(lora_B=torch.zeros(5, 3)), "lora_A has 6 rows and lora_B 5", "both have one row per component"),
    (lambda: grouped(gate=torch.ones(5)), r"gate has shape \(5,\)", r"it must be \(6,\)"),
    (lambda: grouped(gate=torch.ones(6).half()), "gate is torch.float16", r"use gate.float\(\)"),
    (lambda: grouped(ranks=torch.tensor([1, 2])), "ranks is torch.int64", r"it must be int32 \[2\]"),
    (lambda: grouped(weight=W.mT), r"weight has shape \(2, 4, 3\)", r"it must be \(2, 3, 4\)"),
    (lambda: grouped(weight=W, transposed=True), r"weight has shape \(2, 3, 4\)", r"it must be \(2, 4, 3\)"),
    (lambda: grouped(weight=W.half()), "weight is torch.float16", "cast one, or run under torch.autocast"),
    (lambda: grouped(weight=W.clone().requires_grad_()), "weight requires a gradient", FREEZE),
    (lambda: grouped(weight=W, bias=torch.zeros(3)), r"bias has shape \(3,\)", r"it must be \(2, 3\)"),
    (lambda: grouped(weight=W, bias=torch.zeros(2, 3, requires_grad=True)), "bias requires a gradient", FREEZE),
    (lambda: grouped(bias=torch.zeros(2, 3)), "bias is given without weight", "add it to base instead"),
    (lambda: grouped(weight=W, base=torch.zeros(8, 3)), "both weight and base are given", "give weight .*, or base"),
    (lambda: grouped(base=torch.zeros(7, 3)), r"base has shape \(7, 3\)", r"it must be \(8, 3\)"),
    (lambda: grouped(weight=W.to("meta")), "weight is on meta but x is on cpu", MOVE),
    (lambda: grouped(backend="cuda"), "backend is 'cuda'", "it must be one of"),
    (
        lambda: grouped(x=torch.zeros(8, 4, dtype=DOUBLE), backend="triton"),
        "x is torch.float64",
        "use backend='eager' for fp64",
    ),
]


def layer(**options):
    return VariableRankLoRALinear(37, 19, **options)


def set_ranks(ranks):
    return RankTable(2, 4, 6).set_ranks(ranks)


def topk(values, dtype=torch.int64):
    return Routing.from_topk(torch.tensor(values, dtype=dtype), 4)


CHOICES = r"it must be int32 or int64 \[tokens, top_k\]"
FROM_0 = "it must be an integer from 0 to max_rank, "
MODULES = [
    (lambda: RankTable(0, 4, 0), "num_experts is 0", "it must be at least 1"),
    (lambda: RankTable(2, -1, 0), "max_rank is -1", "it must be at least 0"),
    (lambda: RankTable(2, 4, -1), "pool_size is -1", "it must be at least 0"),
    (lambda: RankTable(2, 4, 6, num_projections=0), "num_projections is 0", "it must be at least 1"),
    (lambda: RankTable(2, 4, 9), "can use only 8 rows", "lower pool_size or raise max_rank"),
    (lambda: set_ranks([2, 5]), r"rank 5 of expert 1 is outside 0\.\.4", "raise max_rank .*, or ask for less"),
    (lambda: set_ranks([-1, 2]), r"rank -1 of expert 0 is outside 0\.\.4", "or ask for less"),
    (lambda: set_ranks([4, 3]), "sum to 7, but the pool holds 6 components", "raise the pool size .*, or ask for less"),
    (lambda: set_ranks([1]), "has 1 entries", "it must have one per expert, 2"),
    (lambda: topk([0, 1, 2]), r"top_k_index is torch.int64 of shape \(3,\)", CHOICES),
    (lambda: topk([[0, 1]], torch.float32), r"top_k_index is torch.float32 of shape \(1, 2\)", CHOICES),
    (lambda: topk([[0, 1]], torch.bool), "top_k_index is torch.bool", CHOICES),
    (lambda: topk([[0, 1]], torch.uint8), "top_k_index is torch.uint8", CHOICES),
    (lambda: topk([[0, 5]]), r"top_k_index holds 0\.\.5", "it must be from 0 to 4, where 4 itself drops the pair"),
    (lambda: topk([[-1, 2]]), r"top_k_index holds -1\.\.2", "it must be from 0 to 4"),
    (lambda: layer(max_rank=-1), "max_rank is -1", "it must be at least 0"),
    (lambda: layer(max_rank=4, rank=5), "rank is 5", FROM_0 + "4"),
    (lambda: layer(rank=-1), "rank is -1", FROM_0 + "32"),
    (lambda: layer(rank=1.5), "rank is 1.5", FROM_0),
    (lambda: layer(dropout=1.0), "dropout is 1.0", "it must be at least 0 and below 1"),
    (lambda: layer().set_rank(33), "rank is 33", FROM_0 + "32"),
    (lambda: layer().resize(7), "max_rank is 7, below the rank 8", "lower the rank first with set_rank"),
    (lambda: VariableRankLoRALinear.from_linear(nn.ReLU()), "ReLU has no in_features", r"write .* base=layer\(x\)"),
    (
        lambda: VariableRankLoRALinear.from_linear(layer()),
        "is a VariableRankLoRALinear already",
        "change that one, or merge it first",
    ),
]


def tables(experts, max_rank, pool_size):
    return {"experts": RankTable(experts, max_rank, pool_size)}


POSITIVE = "it must be a positive number, or None"
ABOVE_0 = "it must be an integer of at least 1"
METHODS = [
    (lambda: FixedRank(-1), "rank is -1", "it must be an integer of at least 0"),
    (lambda: FixedRank(2.5), "rank is 2.5", "it must be an integer of at least 0"),
    (lambda: FixedRank("8"), "rank is '8'", "it must be an integer of at least 0"),
    (lambda: LearnedRank(mean_rank=-1.0), "mean_rank is -1.0", "it must be a number of at least 0"),
    (lambda: LearnedRank(mean_rank=math.nan), "mean_rank is nan", "it must be a number of at least 0"),
    (lambda: LearnedRank(max_rank=0), "max_rank is 0", ABOVE_0),
    (lambda: LearnedRank(max_rank=8.0), "max_rank is 8.0", ABOVE_0),
    (lambda: LearnedRank(total_steps=0), "total_steps is 0", "it must be at least 1, or None"),
    (lambda: LearnedRank(tau=(1.0, 0.0)), r"tau is \(1.0, 0.0\)", "it must be two positive numbers"),
    (lambda: LearnedRank(tau=(1.0,)), r"tau is \(1.0,\)", "it must be two positive numbers"),
    (lambda: LearnedRank(warmup=-0.1), "warmup is -0.1", "it must be at least 0 and less than freeze, 0.8"),
    (lambda: LearnedRank(warmup=0.8), "warmup is 0.8", "less than freeze, 0.8"),
    (lambda: LearnedRank(freeze=1.1), "freeze is 1.1", "it must be at most 1"),
    (lambda: LearnedRank(lr=0.0), "lr is 0.0", POSITIVE),
    (lambda: LearnedRank(penalty=-1.0), "penalty is -1.0", "it must be at least 0, or None for a budget"),
    (lambda: LearnedRank().policy({}), "LearnedRank got no rank table", "give it at least one adapter"),
    (lambda: LearnedRank(3, 6).policy(tables(1, 4, 4)), "has max_rank 4, but LearnedRank has 6", "make them equal"),
    (lambda: LearnedRank(3, 6).policy(tables(4, 6, 12)), "shares a pool of 12 rows", "leave out the pool size"),
    (lambda: DynamicRank(initial_rank=-1), "initial_rank is -1", "it must be an integer of at least 0"),
    (lambda: DynamicRank(initial_rank=8.0), "initial_rank is 8.0", "it must be an integer of at least 0"),
    (lambda: DynamicRank(0, 0, 0), "max_rank is 0", ABOVE_0),
    (lambda: DynamicRank(target_rank=7), "target_rank is 7", "from initial_rank, 8, to max_rank, 32"),
    (lambda: DynamicRank(target_rank=33), "target_rank is 33", "from initial_rank, 8, to max_rank, 32"),
    (lambda: DynamicRank(target_rank=16.5), "target_rank is 16.5", "it must be an integer from initial_rank"),
    (lambda: DynamicRank(total_steps=0), "total_steps is 0", "it must be at least 1, or None"),
    (lambda: DynamicRank(interval=0), "interval is 0", ABOVE_0),
    (lambda: DynamicRank(warmup=1.0), "warmup is 1.0", "it must be at least 0 and less than 1"),
    (lambda: DynamicRank(gamma=-0.1), "gamma is -0.1", "it must be a number of at least 0"),
    (lambda: DynamicRank(gamma=math.nan), "gamma is nan", "it must be a number of at least 0"),
    (lambda: DynamicRank(decay=1.0), "decay is 1.0", "it must be at least 0 and less than 1"),
    (lambda: DynamicRank(grow_fraction=1.5), "grow_fraction is 1.5", "it must be from 0 to 1"),
    (lambda: DynamicRank(score="saliancy"), "score is 'saliancy'", 'it must be "paper" or "saliency"'),
    (lambda: DynamicRank(variant="paper"), "variant is 'paper'", 'it must be "exact" or "released"'),
    (lambda: DynamicRank().policy({}), "DynamicRank got no rank table", "give it at least one adapter"),
    (
        lambda: DynamicRank(2, 4, 8).policy(tables(4, 7, 28)),
        "max_rank 7, but DynamicRank has 8",
        "raise the adapter's .* or",
    ),
    (lambda: DynamicRank(2, 4, 8).policy(tables(4, 8, 15)), "a pool of 15 rows for 4 experts", "with pool_rank=4"),
]


def adapted(method=None, targets="q_proj"):
    return apply_lora(Model(), method or FixedRank(2), targets)


def merged():
    adapters = adapted()
    adapters.merge()
    return adapters


def applied_twice():
    apply_lora(adapted().model, FixedRank(2), "k_proj")


def load(change):
    """Load a checkpoint of rank 2 on q_proj, after a change to its directory."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        adapted().save(path)
        change(path)
        load_adapter(Model(), path)


def load_into_another():
    with tempfile.TemporaryDirectory() as directory:
        adapted(targets="layers.0.q_proj").save(directory)
        load_adapter(Model().layers[0], directory)


def load_into_a_longer_name():
    with tempfile.TemporaryDirectory() as directory:
        adapted(targets="layers.0.q_proj").save(directory)
        load_adapter(nn.ModuleDict({"model": Model()}), directory)


def edit(old, new):
    def change(path):
        state = path / "lrlora_state.json"
        state.write_text(state.read_text().replace(old, new))

    return change


GROUPED_LAYER = nn.Sequential(VariableRankLoRAGroupedLinear(2, 4, 4))
NEW_NAME = "/nowhere/new"
MODELS = [
    (lambda: adapted(targets="v_proj"), "target 'v_proj' matches no linear layer", "linear layers are layers.0.q_proj"),
    (lambda: adapted(targets="embed"), r"it matches embed \(Embedding\)", "the linear layers are layers.0.q_proj"),
    (lambda: adapted(targets=[]), "targets is empty", "name layers, e.g. targets='all-linear'"),
    (lambda: adapted(targets="experts"), "target 'experts' matches nothing", "or name linear layers, e.g. targets="),
    (lambda: apply_lora(Model(), FixedRank()), "the model has no adapters to adopt", "name layers"),
    (
        lambda: apply_lora(layer(), FixedRank(), "*"),
        "is itself a VariableRankLoRALinear",
        "give a module that holds it",
    ),
    (lambda: adapted(8), "method is 8", r"must be the settings of one, e.g. FixedRank\(rank=8\), or a dict"),
    (lambda: adapted({"k_proj": FixedRank(2)}), "q_proj is a target, but no method's pattern matches it", "add one"),
    (
        lambda: adapted({"q_proj": FixedRank(2), "k": FixedRank(3)}),
        "'k' matches no target",
        "remove it, or widen targets",
    ),
    (applied_twice, "the model has adapters already: layers.0.q_proj", "in one call as a dict .*, or merge them first"),
    (
        lambda: adapted(LearnedRank(2, 4)).step(),
        "does not know the length of the run",
        "pass total_steps, or give",
    ),
    (lambda: adapted(LearnedRank(2, 4)).compact(), "LearnedRank still changes ranks", "compact after its freeze"),
    (lambda: merged().save(NEW_NAME), "are merged into the model, so there is nothing to save", "save the model"),
    (lambda: merged().export(NEW_NAME), "are merged into the model, so there is nothing to export", "save the model"),
    (lambda: adapted().export(NEW_NAME, "gguf"), "format is 'gguf'", "it must be one of peft"),
    (lambda: adapted().export(Path(__file__).parent), "exists and is not an empty directory", "give a new one"),
    (lambda: apply_lora(GROUPED_LAYER, FixedRank(2)).unadapted(), "is no other layer's adapter", "merge it"),
    (lambda: examine(merged(), {"ids": IDS}), "the adapters are merged", r"examine before merge\(\)"),
    (
        lambda: load_adapter(Model(), NEW_NAME),
        "holds no adapter_config.json",
        "give the directory that PEFT's save_pretrained",
    ),
    (lambda: adapted().load(NEW_NAME), "holds no lrlora_state.json", "give the directory that Adapters.save wrote"),
    (
        lambda: load(edit('"version": 1', '"version": 2')),
        "format version 2, and this library reads 1",
        "update lrlora_ops",
    ),
    (
        lambda: load(edit("FixedRank", "Unheard")),
        "the method 'Unheard', which this version does not know",
        "update lrlora_ops",
    ),
    (
        lambda: load(
            edit(
                "{",
                "",
            )
        ),
        "is damaged",
        "load another checkpoint",
    ),
    (load_into_another, "target 'layers.0.q_proj' matches no linear layer", "the linear layers are q_proj, k_proj"),
    (
        load_into_a_longer_name,
        "layers.0.q_proj of the checkpoint is model.layers.0.q_proj here",
        "give the model that was saved",
    ),
]

OTHER_ERRORS = {  # by what is said; all others are ValueErrors
    "holds no": FileNotFoundError,
    "exists and is": FileExistsError,
    "still changes ranks": RuntimeError,
    "does not know the length": RuntimeError,
}
ROWS = [*LINEAR, *GROUPED, *MODULES, *METHODS, *MODELS]
