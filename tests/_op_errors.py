"""Calls of the ops that are refused, for the table of ``_api_errors.py``."""

from __future__ import annotations

import math

import torch

from lrlora_ops import (
    ExpertLinear,
    RankTable,
    grouped_lora_linear,
    lora_linear,
    moe_lora_mlp,
    sinc_lora_linear,
)

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


def mlp(**changes):
    """moe_lora_mlp of 2 experts of rank 3, 4 tokens of 2 choices, H 4 and I 3."""
    frozen = torch.zeros(2, 6, 4), torch.zeros(2, 4, 3)
    up = ExpertLinear(frozen[0], torch.zeros(6, 4), torch.zeros(6, 6), torch.ones(6))
    down = ExpertLinear(frozen[1], torch.zeros(6, 3), torch.zeros(6, 4), torch.ones(6))
    given = {
        "x": torch.zeros(4, 4),
        "top_k_index": torch.zeros(4, 2, dtype=torch.int64),
        "top_k_weights": torch.ones(4, 2),
        "up": up,
        "down": down,
        "table": RankTable.uniform(2, 3),
        "activation": "silu",
    }
    return moe_lora_mlp(**given | changes)


MLP = [
    (lambda: mlp(x=torch.zeros(3, 4)), r"x has shape \(3, 4\), top_k_index \(4, 2\)", r"must be \[tokens, hidden\]"),
    (
        lambda: mlp(top_k_weights=torch.ones(4, 3)),
        r"top_k_weights \(4, 3\)",
        r"and \[tokens, top_k\]",
    ),
    (lambda: mlp(top_k_index=torch.full((4, 2), 3)), r"top_k_index holds 3\.\.3", "from 0 to 2, where 2 itself drops"),
    (lambda: mlp(activation="relu"), "activation is 'relu'", "must be a function, or one of .*silu"),
    (
        lambda: mlp(backend="reference"),
        "experts have the backends 'triton' and 'eager'",
        "the oracle is in lrlora_ops",
    ),
    (lambda: mlp(ranks=torch.ones(3, dtype=INT32)), r"ranks is torch.int32 of shape \(3,\)", r"it must be int32 \[2\]"),
    (lambda: mlp(table=RankTable.uniform(2, 4)), "lora_A has 6 rows, but the table hands out 8", "make them equal"),
]


def sinc(**changes):
    """sinc_lora_linear with K 5, N 4, 3 components and 5 coefficients."""
    good = {"x": torch.zeros(2, 5), "weight": FROZEN, "lora_A": torch.zeros(3, 5), "lora_B": torch.zeros(3, 4)}
    good |= {"coefficients": torch.zeros(5), "grid": 0.7, "scaling": 1.0}
    return sinc_lora_linear(**good | changes)


ABOVE_0 = "it must be a finite number above 0, the distance between two sinc functions"
SINC = [
    (lambda: sinc(x=torch.zeros(2, 6)), r"x has shape \(2, 6\) and lora_A \(3, 5\)", "must be equal"),
    (lambda: sinc(coefficients=torch.zeros(4)), r"coefficients has shape \(4,\)", r"it must be \[2n \+ 1\]"),
    (lambda: sinc(coefficients=torch.zeros(3).half()), "coefficients is torch.float16", "must be torch.float32 or"),
    (lambda: sinc(grid=0.0), "grid is 0.0", ABOVE_0),
    (lambda: sinc(grid=math.inf), "grid is inf", ABOVE_0),
    (lambda: sinc(weight=torch.zeros(5, 4)), r"weight has shape \(5, 4\)", r"it must be \(4, 5\)"),
    (lambda: sinc(weight=TRAINED), "weight requires a gradient", r"with weight.requires_grad_\(False\)$"),
    (lambda: sinc(weight=FROZEN.half()), "weight is torch.float16 but x is torch.float32", "cast one, or run under"),
    (lambda: sinc(bias=torch.zeros(5)), r"bias has shape \(5,\)", r"it must be \(4,\)"),
    (lambda: sinc(lora_B=torch.zeros(2, 4)), "lora_A has 3 rows and lora_B 2", "both have one row per component"),
    (lambda: sinc(lora_A=torch.zeros(3, 5, device="meta")), "lora_A is on meta but x is on cpu", MOVE),
    (lambda: sinc(backend="cuda"), "backend is 'cuda'", r"one of \('triton', 'eager', 'reference'\), or None"),
]

OPS = [*LINEAR, *GROUPED, *MLP, *SINC]
