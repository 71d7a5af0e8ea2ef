"""What lora_linear refuses: one ValueError that names the argument, what it was, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrlora_ops import lora_linear

INT32 = torch.int32
frozen = torch.zeros(4, 5, requires_grad=True)

BAD = [
    ({"x": torch.zeros(2, 6)}, r"x has shape \(2, 6\) and lora_A \(3, 5\).*one row a component"),
    ({"x": torch.zeros(())}, r"x has shape \(\) and lora_A"),
    ({"x": torch.zeros(2, 5, dtype=torch.int64)}, r"x is torch.int64; it must be one of"),
    ({"lora_A": torch.zeros(3, 5, dtype=torch.float8_e4m3fn)}, "lora_A is torch.float8_e4m3fn; it must be one of"),
    ({"lora_B": torch.zeros(3, 4, dtype=torch.complex64)}, "lora_B is torch.complex64; it must be one of"),
    ({"lora_A": torch.zeros(5)}, r"lora_A has shape \(5,\); it must be \[pool rows, features\]"),
    ({"lora_B": torch.zeros(1, 3, 4)}, r"lora_B has shape \(1, 3, 4\); it must be"),
    ({"lora_B": torch.zeros(4, 3)}, r"lora_A has 3 rows and lora_B 4.*the transpose of PEFT's"),
    ({"gate": torch.ones(2)}, r"gate has shape \(2,\); it must be \(3,\)"),
    ({"gate": torch.ones(3, dtype=torch.bfloat16)}, r"gate is torch.bfloat16; .* use gate.float\(\)"),
    ({"rank": 4}, "rank is 4; it must be from 0 to 3, the rows of lora_A"),
    ({"rank": -1}, "rank is -1; it must be from 0 to 3"),
    ({"rank": 2.0}, "rank is 2.0; it must be an integer, an int32 tensor of one element, or None"),
    ({"rank": torch.tensor(2)}, r"rank is a torch.int64 tensor of shape \(\); it must hold one int32"),
    ({"rank": torch.tensor([2, 2], dtype=INT32)}, r"rank is a torch.int32 tensor of shape \(2,\); it must hold one"),
    ({"rank": torch.tensor(4, dtype=INT32)}, "rank is 4; it must be from 0 to 3"),  # read where that is free
    ({"rank": torch.tensor([-1], dtype=INT32)}, "rank is -1; it must be from 0 to 3"),
    ({"rank": torch.tensor(1, dtype=INT32, device="meta")}, "rank is on meta but x is on cpu; move one of them"),
    ({"weight": torch.zeros(5, 4)}, r"weight has shape \(5, 4\); it must be \(4, 5\)"),
    ({"weight": torch.zeros(4, 5).half()}, "weight is torch.float16 but x is torch.float32; .*torch.autocast"),
    ({"weight": frozen}, r"weight requires a gradient.*weight.requires_grad_\(False\)"),
    ({"weight": torch.zeros(4, 5, device="meta")}, "weight is on meta but x is on cpu; move one of them"),
    ({"weight": torch.zeros(4, 5), "bias": frozen[:, 0]}, r"bias requires a gradient.*bias.requires_grad_\(False\)"),
    ({"weight": torch.zeros(4, 5), "bias": torch.zeros(5)}, r"bias has shape \(5,\); it must be \(4,\)"),
    ({"weight": torch.zeros(4, 5), "bias": torch.zeros(4).double()}, "bias is torch.float64 but x is torch.float32"),
    ({"bias": torch.zeros(4)}, "bias is given without weight; add it to base instead"),
    ({"weight": torch.zeros(4, 5), "base": torch.zeros(2, 4)}, "both weight and base are given"),
    ({"base": torch.zeros(4)}, r"base has shape \(4,\); it must be \(2, 4\)"),
    ({"base": torch.zeros(2, 4, dtype=torch.int8)}, "base is torch.int8; it must be one of"),
    ({"base": torch.zeros(2, 4, device="meta")}, "base is on meta but x is on cpu"),
    ({"gate": torch.ones(3, device="meta")}, "gate is on meta but x is on cpu"),
    ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"dropout": float("nan")}, "dropout is nan"),
    ({"backend": "cuda"}, r"backend is 'cuda'; it must be one of \('triton', 'eager', 'reference'\), or None"),
    ({"backend": "reference", "dropout": 0.5}, "backend 'reference' has no dropout"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[f"{next(iter(w))}-{i}" for i, (w, _) in enumerate(BAD)])
def test_bad_arguments(wrong, message):
    good = {"x": torch.zeros(2, 5), "lora_A": torch.zeros(3, 5), "lora_B": torch.zeros(3, 4)}
    assert lora_linear(**good).shape == (2, 4)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        lora_linear(**good | wrong)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "base"])
def test_triton_refuses_float64(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"x": (2, 5), "lora_A": (3, 5), "lora_B": (3, 4), "base": (2, 4)}
    tensors = {n: torch.zeros(shape, device=device) for n, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"{name} is torch.float64.*use backend='eager' for fp64"):
        lora_linear(**tensors | {name: tensors[name].double()}, backend="triton")


def test_triton_on_the_cpu_needs_its_interpreter():
    code = """if True:
        import torch, lrlora_ops
        try:
            lrlora_ops.lora_linear(torch.ones(2, 5), torch.ones(3, 5), torch.ones(3, 4), backend="triton")
        except ValueError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert "set TRITON_INTERPRET=1 before lrlora_ops is imported); use backend='eager'" in result.stdout


def test_a_model_on_the_meta_device_has_shapes():
    x, lora_A, lora_B = (torch.zeros(2, n, device="meta", requires_grad=True) for n in (5, 5, 4))
    y = lora_linear(x, lora_A, lora_B, weight=torch.zeros(4, 5, device="meta"))
    y.sum().backward()
    assert (y.shape, x.grad.shape, lora_B.grad.device.type) == ((2, 4), (2, 5), "meta")
