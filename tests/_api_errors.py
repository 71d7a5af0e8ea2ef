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
    SincLoRALinear,
    SincUpdate,
    VariableRankLoRAGroupedLinear,
    VariableRankLoRALinear,
    apply_lora,
    load_adapter,
)
from lrlora_ops.doctor import examine
from tests._models import IDS, Model
from tests._op_errors import OPS


def layer(**options):
    return VariableRankLoRALinear(37, 19, **options)


def set_ranks(ranks):
    return RankTable(2, 4, 6).set_ranks(ranks)


def topk(values, dtype=torch.int64):
    return Routing.from_topk(torch.tensor(values, dtype=dtype), 4)


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *_: None)
    return linear


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
    (lambda: SincLoRALinear(4, 4, num_coefficients=2), "num_coefficients is 2", "it must be odd and at least 1"),
    (lambda: SincLoRALinear(4, 4, grid=0.0), "grid is 0.0", "it must be a finite number above 0"),
    (
        lambda: SincLoRALinear.from_linear(SincLoRALinear(4, 4)),
        "is a SincLoRALinear already",
        "change that one, or merge it first",
    ),
    (
        lambda: SincLoRALinear.from_linear(hooked()),
        "is a Linear that is no plain nn.Linear",
        "load the layer unquantised, or adapt it by another method",
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
    (lambda: SincUpdate(0), "rank is 0", ABOVE_0),
    (lambda: SincUpdate(num_coefficients=4), "num_coefficients is 4", "it must be an odd number of at least 1"),
    (lambda: SincUpdate(grid=-1.0), "grid is -1.0", "it must be a finite number above 0, or None"),
    (lambda: SincUpdate(share="model"), "share is 'model'", "it must be one of .*'layer', 'type', 'global'"),
]


def adapted(method=None, targets="q_proj"):
    return apply_lora(Model(), method or FixedRank(2), targets)


def merged():
    adapters = adapted()
    adapters.merge()
    return adapters


def with_sinc(method=None, **options):
    """A model with SincUpdate, whose adapters another call then is to adopt with the method, if there is one."""
    model = apply_lora(Model(), SincUpdate(3, 5), "q_proj", **options).model
    return model if method is None else apply_lora(model, method)


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
    (lambda: with_sinc(dropout=0.1), "layers.0.q_proj: SincUpdate has no dropout", "leave it 0"),
    (lambda: with_sinc(FixedRank(3)), "is a SincLoRALinear, which FixedRank cannot rule", "SincUpdate is for"),
    (lambda: with_sinc(LearnedRank(2, 3)), "is a SincLoRALinear, which LearnedRank cannot rule", "SincUpdate is for"),
    (
        lambda: with_sinc(SincUpdate(4)),
        r"has \(rank, num_coefficients\) \(3, 5\), but the method \(4, 9\)",
        "make them equal",
    ),
    (
        lambda: apply_lora(nn.Sequential(layer()), SincUpdate()),
        "a VariableRankLoRALinear, which SincUpdate cannot rule",
        "SincUpdate is for",
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
ROWS = [*OPS, *MODULES, *METHODS, *MODELS]
