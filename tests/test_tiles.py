"""The precision of fp32 products in the kernels: as the user set it for torch, by either of torch's settings."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

dot_precision = importlib.import_module("lrlora_ops.kernels._tiles").dot_precision
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "ieee"  # else the next line's setting may count as mixed with it
    torch.set_float32_matmul_precision("highest")


def test_fp32_is_exact_by_default():
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_follows_float32_matmul_precision(setting, expected):
    torch.set_float32_matmul_precision(setting)
    assert dot_precision(torch.float32) == expected
    assert dot_precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("expected", ["ieee", "tf32"])
def test_follows_fp32_precision(expected):
    """After this setting torch.get_float32_matmul_precision may raise."""
    if not hasattr(MATMUL, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no torch.backends.cuda.matmul.fp32_precision")
    MATMUL.fp32_precision = expected
    assert dot_precision(torch.float32) == expected
    assert dot_precision(torch.float16) == "ieee"


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_follows_float32_matmul_precision_of_an_older_torch(setting, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    torch.set_float32_matmul_precision(setting)
    assert dot_precision(torch.float32) == expected
