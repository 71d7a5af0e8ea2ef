"""What one compiled kernel is made of, read from its machine code: SASS for NVIDIA, amdgcn assembly for AMD."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Words of a load's opcode that give its width in bytes; without one it is 4 in SASS (LDG.E).
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_WIDTHS |= {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}
_WIDTHS |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


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
    command = [str(NVIDIA_BIN / "cuobjdump"), option, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache  # a disassembly takes a second, and many launches share their code
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
        wide_loads=_wide_share(loads),
        loads=loads,
    )


def _select(opcodes: Counter[str], pattern: str) -> dict[str, int]:
    """The opcodes whose first part is ``pattern``, most frequent first."""
    return {name: count for name, count in opcodes.most_common() if re.fullmatch(pattern, name.split(".")[0])}


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
        wide_loads=_wide_share(loads),
        loads=loads,
    )


def load_width(opcode: str) -> int:
    """Bytes per lane that a global load brings; 16 for the bulk copies of tensor memory access."""
    if opcode.startswith(("UTMALDG", "UBLKCP")):
        return 16
    return next((_WIDTHS[word] for word in re.split(r"[._]", opcode) if word in _WIDTHS), 4)


def _wide_share(loads: dict[str, int]) -> float:
    total = sum(load_width(opcode) * count for opcode, count in loads.items())
    wide = sum(load_width(opcode) * count for opcode, count in loads.items() if load_width(opcode) >= 16)
    return wide / total if total else 1.0
