"""What grouped_lora_linear refuses: each message says what was given and what to do."""

from __future__ import annotations

import pytest
import torch

from lrlora_ops import RankTable, grouped_lora_linear

BAD = {
    "x of three dimensions": ({"x": torch.randn(1, 8, 4)}, "x has shape .* must be \\[rows sorted by expert"),
    "x of other features": ({"x": torch.randn(8, 5)}, "last dimensions must be equal"),
    "integers": ({"x": torch.zeros(8, 4, dtype=torch.int32)}, "x is torch.int32"),
    "offsets of int64": ({"group_offsets": torch.tensor([0, 3, 8])}, "must be int32 \\[3\\].*Routing.from_topk"),
    "offsets of another length": ({"group_offsets": torch.tensor([0, 8], dtype=torch.int32)}, "must be int32 \\[3\\]"),
    "offsets without 0": ({"group_offsets": torch.tensor([1, 3, 8], dtype=torch.int32)}, "must start with 0"),
    "offsets that decrease": ({"group_offsets": torch.tensor([0, 9, 8], dtype=torch.int32)}, "never decrease"),
    "offsets past x": ({"group_offsets": torch.tensor([0, 3, 9], dtype=torch.int32)}, "within the 8 rows of x"),
    "pool of another size": ({"lora_A": torch.randn(5, 4), "lora_B": torch.randn(5, 3)}, "the table hands out 6"),
    "pools of two sizes": ({"lora_B": torch.randn(5, 3)}, "lora_A has 6 rows and lora_B 5"),
    "gate of another size": ({"gate": torch.ones(5)}, "gate has shape \\(5,\\); it must be \\(6,\\)"),
    "gate in half precision": ({"gate": torch.ones(6, dtype=torch.float16)}, "use gate.float\\(\\)"),
    "ranks of int64": ({"ranks": torch.tensor([1, 2])}, "ranks is torch.int64.* must be int32 \\[2\\]"),
    "weight transposed": ({"weight": torch.randn(2, 4, 3)}, "weight has shape .* must be \\(2, 3, 4\\)"),
    "weight not transposed": (
        {"weight": torch.randn(2, 3, 4), "transposed": True},
        "weight has shape .* must be \\(2, 4, 3\\)",
    ),
    "weight of another dtype": ({"weight": torch.randn(2, 3, 4).half()}, "cast one, or run under torch.autocast"),
    "weight that is trained": ({"weight": torch.randn(2, 3, 4, requires_grad=True)}, "weight requires a gradient"),
    "bias of another shape": ({"weight": torch.randn(2, 3, 4), "bias": torch.randn(3)}, "bias has shape"),
    "bias that is trained": (
        {"weight": torch.randn(2, 3, 4), "bias": torch.randn(2, 3, requires_grad=True)},
        "bias requires a gradient",
    ),
    "bias alone": ({"bias": torch.randn(2, 3)}, "bias is given without weight"),
    "weight and base": ({"weight": torch.randn(2, 3, 4), "base": torch.randn(8, 3)}, "both weight and base are given"),
    "base of another shape": ({"base": torch.randn(7, 3)}, "base has shape"),
    "weight on another device": ({"weight": torch.randn(2, 3, 4, device="meta")}, "weight is on meta but x is on cpu"),
    "unknown backend": ({"backend": "cuda"}, "backend is 'cuda'; it must be one of"),
    "fp64 on triton": (
        {name: torch.randn(*shape, dtype=torch.float64) for name, shape in (("x", (8, 4)), ("lora_A", (6, 4)))}
        | {"backend": "triton"},
        "use backend='eager' for fp64",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(changes, message):
    arguments = {
        "x": torch.randn(8, 4),
        "lora_A": torch.randn(6, 4),
        "lora_B": torch.randn(6, 3),
        "group_offsets": torch.tensor([0, 3, 8], dtype=torch.int32),
        "table": RankTable.uniform(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        grouped_lora_linear(**arguments | changes)
