"""What one compiled kernel is made of, read from its machine code: SASS for NVIDIA, amdgcn assembly for AMD."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTH_OF_SUFFIX = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_WIDTH_OF_NAME = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12}


@dataclass(frozen=True)
class Code:
    """Facts about one kernel's code. ``spills`` counts instructions on NVIDIA, registers on AMD."""

    registers: int  # 32-bit, per lane; vector and accumulator registers together on AMD
    spills: int
    stack: int  # bytes of local (scratch) memory per lane
    shared: int  # bytes per program
    matrix: dict[str, int]  # matrix instructions by opcode
    wide_loads: float  # share of the loaded bytes that a 16-byte (or bulk) instruction brings from global memory
    loads: dict[str, int]  # global loads by opcode


def read_code(compiled: Any) -> Code:
    """The facts of a ``triton.compiler.CompiledKernel``, without a GPU."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _cuobjdump(option: str, cubin: str) -> str:
    command = [str(_NVIDIA_BIN / "cuobjdump"), option, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_cubin(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.x]*)", sass))
    loads = _select(opcodes, r"LDG|LDGSTS|UTMALDG|UBLKCP")
    return Code(
        registers=resources["REG"],
        spills=sum(_select(opcodes, r"LDL|STL").values()),
        stack=resources["STACK"] + resources["LOCAL"],
        shared=shared,
        matrix=_select(opcodes, r"HGMMA|QGMMA|HMMA|UTC[A-Z]*MMA"),
        wide_loads=_wide_share((_sass_width(opcode), count) for opcode, count in loads.items()),
        loads=loads,
    )


def _select(opcodes: Counter[str], pattern: str) -> dict[str, int]:
    """The opcodes whose first part is ``pattern``, most frequent first."""
    return {name: count for name, count in opcodes.most_common() if re.fullmatch(pattern, name.split(".")[0])}


def _sass_width(opcode: str) -> int:
    name, *suffixes = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP"):
        return 16
    return next((_WIDTH_OF_SUFFIX[suffix] for suffix in suffixes if suffix in _WIDTH_OF_SUFFIX), 4)


def _read_amdgcn(assembly: str, shared: int) -> Code:
    metadata = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.M)}
    opcodes = Counter(re.findall(r"^\t([a-z][a-z0-9_]+)", assembly, re.M))
    loads = {name: n for name, n in opcodes.most_common() if re.match(r"(global|buffer|flat)_load_", name)}
    return Code(
        registers=metadata["vgpr_count"],  # AccumOffset and the accumulators included
        spills=metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        stack=metadata["private_segment_fixed_size"],
        shared=max(shared, metadata["group_segment_fixed_size"]),
        matrix={name: n for name, n in opcodes.most_common() if name.startswith("v_mfma")},
        wide_loads=_wide_share((_amd_width(opcode), count) for opcode, count in loads.items()),
        loads=loads,
    )


def _amd_width(opcode: str) -> int:
    return next((_WIDTH_OF_NAME[part] for part in opcode.split("_") if part in _WIDTH_OF_NAME), 16)


def _wide_share(loads: Iterable[tuple[int, int]]) -> float:
    loads = list(loads)
    total = sum(width * count for width, count in loads)
    return sum(width * count for width, count in loads if width >= 16) / total if total else 1.0
