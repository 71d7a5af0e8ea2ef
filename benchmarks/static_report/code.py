"""What one compiled kernel is made of, read from its machine code: SASS for NVIDIA, amdgcn assembly for AMD."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
    """Facts about one kernel's code.

    ``spills`` counts instructions on NVIDIA, vector registers on AMD, and costs memory traffic. ``scalar_spills`` are
    AMD's scalar registers that are kept in lanes of vector registers, and cost instructions alone.
    """

    registers: int  # 32-bit, per lane; vector and accumulator registers together on AMD
    spills: int
    scalar_spills: int
    stack: int  # bytes of local (scratch) memory per lane
    shared: int  # bytes per program
    matrix: dict[str, int]  # matrix instructions by opcode
    wide_loads: float  # share of the loaded bytes that a 16-byte (or bulk) instruction brings from global memory
    loads: dict[str, int]  # global loads by opcode


def read_codes(kernels: Sequence[Any]) -> list[Code]:
    """The facts of each ``triton.compiler.CompiledKernel``, all compiled for one GPU, which need not be there."""
    if not kernels or "cubin" not in kernels[0].asm:
        return [_read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared) for kernel in kernels]
    opcodes = _disassemble([_text(kernel.asm["cubin"]) for kernel in kernels], kernels[0].metadata.target.arch)
    return [_read_cubin(kernel, counts) for kernel, counts in zip(kernels, opcodes, strict=True)]


def _nvidia_tool(*arguments: str, data: bytes) -> str:
    """What an NVIDIA tool prints about a file of ``data``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        command = [str(NVIDIA_BIN / arguments[0]), *arguments[1:], file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _text(cubin: bytes) -> bytes:
    """The instructions in a cubin, an ELF file of 64 bits: its sections named ``.text.*``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, num_entries, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Each entry: name, type, flags, address, offset, size.
    entries = [struct.unpack_from("<2I4Q", cubin, table + index * entry_size) for index in range(num_entries)]
    first_name = entries[names][4]
    return b"".join(
        cubin[offset : offset + size]
        for name, *_, offset, size in entries
        if cubin.startswith(b".text.", first_name + name)
    )


def _disassemble(texts: list[bytes], arch: int) -> list[Counter[str]]:
    """Opcodes of each kernel's instructions, of 16 bytes each; one call for all, as nvdisasm is slow to start."""
    options = ("--binary", f"SM{arch}{'a' if arch >= 90 else ''}", "--no-dataflow")
    sass = _nvidia_tool("nvdisasm", *options, data=b"".join(texts))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.x]*)", sass)
    bounds = list(accumulate((len(text) // 16 for text in texts), initial=0))
    if len(opcodes) != bounds[-1]:
        raise RuntimeError(f"{NVIDIA_BIN / 'nvdisasm'} printed {len(opcodes)} of {bounds[-1]} instructions")
    return [Counter(opcodes[first:end]) for first, end in pairwise(bounds)]


def _read_cubin(kernel: Any, opcodes: Counter[str]) -> Code:
    usage = _nvidia_tool("cuobjdump", "-res-usage", data=kernel.asm["cubin"])
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads = _select(opcodes, r"LDG|LDGSTS|UTMALDG|UBLKCP")
    return Code(
        registers=resources["REG"],
        spills=sum(_select(opcodes, r"LDL|STL").values()),
        scalar_spills=0,
        stack=resources["STACK"] + resources["LOCAL"],
        shared=kernel.metadata.shared,
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
        spills=metadata["vgpr_spill_count"],
        scalar_spills=metadata["sgpr_spill_count"],
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
