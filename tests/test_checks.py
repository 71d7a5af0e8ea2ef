"""What lora_linear refuses: one ValueError that names the argument, what it was, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrlora_ops import lora_linear


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
