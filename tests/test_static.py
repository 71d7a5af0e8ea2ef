"""What the compiler makes of the kernels, for GPUs that need not be there (docs/static.md), and the computed floors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.floors import base_cost, lora_cost
from benchmarks.shapes import Shape

code = pytest.importorskip("benchmarks.static_report.code", reason="needs triton")
targets = pytest.importorskip("benchmarks.static_report.targets", reason="needs triton")
configs = pytest.importorskip("lrlora_ops.kernels._configs", reason="needs triton")

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
MATRIX_KERNELS = {"shrink_kernel", "expand_kernel", "gram_kernel", "shrink_gram_kernel", "grouped_gemm_kernel"}
MATRIX_KERNELS |= {"gated_shrink_kernel", "gated_shrink_backward_kernel", "adapter_gradients_kernel"}
MATRIX_KERNELS |= {"sinc_weight_kernel", "sinc_gradients_kernel"}
# One of its products has tiles of 16 rows, dA's; wgmma's and tcgen05's have 64 or more.
NARROW = "sinc_gradients_kernel"
MATRIX_OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def narrow_share(loads: dict[str, int]) -> float:
    """Of the bytes that the load instructions bring: by less than 4 per lane."""
    widths = [(code.load_width(opcode), count) for opcode, count in loads.items()]
    return sum(width * count for width, count in widths if width < 4) / sum(width * count for width, count in widths)


def violations(row: Row) -> Iterator[str]:
    if row["spills"] or row["stack"]:
        yield f"{row['spills']} spills, {row['stack']} bytes of stack"
    if row["shared"] > row["shared_limit"]:
        yield f"{row['shared']} bytes of shared memory, limit {row['shared_limit']}"
    if row["blocks"] < 1:
        yield "does not fit on a multiprocessor"
    if narrow_share(row["loads"]) > 0.01:  # a bias alone may be loaded by single elements
        yield f"loads of single elements: {row['loads']}"
    if row["kernel"] in MATRIX_KERNELS and row["dtypes"].startswith("bf16"):
        wanted = MATRIX_OPCODES[row["target"]]
        found = [opcode.startswith(wanted) for opcode in row["matrix"]]
        if not any(found) or (row["kernel"] != NARROW and not all(found)):
            yield f"multiplies with {row['matrix']}, not {wanted}"
        if row["target"] == "sm_90" and row["layout"] == "dense" and row["wide_loads"] < 0.85:
            yield f"{row['wide_loads']:.0%} of its bytes are loaded by 16"


needs_disassembler = pytest.mark.skipif(
    not (code.NVIDIA_BIN / "nvdisasm").exists(), reason="this build of triton carries no NVIDIA tools"
)


@needs_disassembler
@pytest.mark.parametrize("target", targets.TARGETS)
def test_compiled_kernels(target, tmp_path):
    """One test per target: a process that compiles takes seconds to start, and parallel tests share the targets."""
    rows = compiled(target, tmp_path / "static.json", "--quick")

    kernels = {row["kernel"] for row in rows}
    assert kernels > MATRIX_KERNELS
    if target == "sm_90":
        assert kernels == set(all_kernels()), "a kernel without a case in static_report/cases.py"
        assert {(kernel, capacity) for kernel in MATRIX_KERNELS for capacity in (16, 128)} < bf16_tiles(rows)
    assert not (found := problems(rows)), "\n".join(found)


@pytest.mark.slow
@needs_disassembler
@pytest.mark.parametrize("target", targets.TARGETS)
def test_all_that_is_shipped(target, tmp_path):
    """Every kernel in every tile, as ``make static`` prints it."""
    rows = compiled(target, tmp_path / "static.json")

    assert {(kernel, capacity) for kernel in MATRIX_KERNELS for capacity in (16, 32, 64, 128)} < bf16_tiles(rows)
    if target == "sm_90":
        assert {row["tile"].split(" R")[0] for row in rows if row["kernel"] == "grouped_gemm_kernel"} >= {
            f"M{tile.block_m} N{tile.block_n} K{tile.block_r}" for tile in configs.GEMM_CONFIGS["cuda", 2]
        }
    assert not (found := problems(rows)), "\n".join(found)


def bf16_tiles(rows: list[Row]) -> set[tuple[str, int]]:
    return {(row["kernel"], row["capacity"]) for row in rows if "bf16" in row["dtypes"]}


def problems(rows: list[Row]) -> list[str]:
    return [
        f"{row['kernel']} {row['dtypes']} {row['layout']} r={row['capacity']}: {violation}"
        for row in rows
        for violation in violations(row)
    ]


def all_kernels() -> Iterator[str]:
    for file in (ROOT / "kernels").glob("*.py"):
        yield from re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)


def compiled(target: str, path: Path, *options: str) -> list[Row]:
    """The rows of the report, from a process whose Triton compiles (this one's may interpret)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", "--jobs", "1", *options]
    command += ["--target", target, "--json", str(path)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text())


def test_interpreter_is_refused():
    command = [sys.executable, "-m", "benchmarks.static"]
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert finished.returncode == 2
    assert "unset it" in finished.stderr


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "blocks"),
    [
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 33, 0, 4, 12),  # allocated by eights: 40 registers, 51 warps, 48 on four schedulers
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 16, 0, 1, 32),  # as many blocks as there may be
        ("sm_90", 32, 227 << 10, 4, 1),  # all the shared memory that a block may have
        ("sm_80", 32, 80 << 10, 4, 2),  # 1 KB of each block's shared memory is the system's
        ("sm_80", 32, 82 << 10, 4, 1),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 64, 33 << 10, 4, 1),
    ],
)
def test_occupancy(target, registers, shared, num_warps, blocks):
    assert targets.TARGETS[target].blocks_per_multiprocessor(registers, shared, num_warps) == blocks


def test_spills_of_scalars_are_apart():
    """They move to lanes of vector registers, not to memory."""
    counts = {"vgpr_count": 128, "vgpr_spill_count": 3, "sgpr_spill_count": 5, "private_segment_fixed_size": 16}
    counts |= {"group_segment_fixed_size": 0}
    read = code._read_amdgcn("".join(f"    .{name}: {count}\n" for name, count in counts.items()), 1024)
    assert (read.spills, read.scalar_spills, read.stack) == (3, 5, 16)


def test_load_width():
    widths = {"LDG.E.128": 16, "LDGSTS.E.BYPASS.128": 16, "LDG.E": 4, "LDG.E.U16.CONSTANT": 2, "LDG.E.64": 8}
    widths |= {"buffer_load_dwordx4": 16, "global_load_dword": 4, "buffer_load_ushort": 2, "global_load_dwordx3": 12}
    assert {opcode: code.load_width(opcode) for opcode in widths} == widths


@pytest.mark.parametrize(
    ("M", "K", "N", "base", "rank_16", "rank_128"),  # ms, as KERNELS.md tabulates the arithmetic
    [
        (8192, 4096, 4096, 0.70, 0.048, 0.065),
        (16384, 4096, 14336, 4.87, 0.17, 0.29),
        (16384, 14336, 4096, 4.87, 0.25, 0.29),
        (32768, 4096, 4096, 2.78, 0.19, 0.26),
    ],
)
def test_floors(M, K, N, base, rank_16, rank_128):
    shape = Shape("8B", "projection", M, K, N)
    computed = (base_cost(shape).floor_ms(), lora_cost(shape, 16).floor_ms(), lora_cost(shape, 128).floor_ms())
    assert computed == pytest.approx((base, rank_16, rank_128), rel=0.03)
