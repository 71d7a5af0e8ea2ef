"""What the benchmarks print and write: a table of overheads, and everything as JSON with where it was measured."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import lrlora_ops
from benchmarks.floors import Machine
from benchmarks.race import Row

_COLUMNS = {  # heading -> what stands there
    "provider": lambda row: row.provider,
    "ms": lambda row: _number(row.time.median),
    "overhead ms": lambda row: _number(row.overhead and row.overhead.median),
    "p20..p80": lambda row: f"{_number(_shown(row).p20)}..{_number(_shown(row).p80)}",
    "of base": lambda row: "" if row.overhead_to_base is None else f"{row.overhead_to_base:.1%}",
    "/ PEFT": lambda row: _number(row.overhead_to_peft),
    "floor ms": lambda row: _number(row.floor_ms),
    "GFLOP/s": lambda row: _number(row.tflops and 1e3 * row.tflops),
    "GB/s": lambda row: _number(row.gb_per_s),
    "peak +MB": lambda row: f"{row.peak_extra_mb:.1f}",
    "saved MB": lambda row: "" if row.saved_mb is None else f"{row.saved_mb:.2f}",
}


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def environment(device: torch.device, machines: Iterable[Machine]) -> dict[str, Any]:
    """Where, when and with what: the device, its own rates, the date, the commit and the versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"lrlora_ops": lrlora_ops.__version__, "python": platform.python_version(), **_versions()},
        "machines": [asdict(machine) for machine in machines],
    }


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """The rows for people: a block per case and mode, the overhead over the base layer in its middle."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"{about['device']}, {about['threads']} threads, {about['date']}, commit {about['commit']}",
        versions,
        *(
            f"{m['name']}: copy {m['bandwidth'] / 1e9:.4g} GB/s, matmul {m['flops'] / 1e9:.4g} GFLOP/s"
            for m in about["machines"]
        ),
        "Overhead: median over rounds of what a provider took beyond the base layer in the same round, with its",
        "p20..p80. Rates of an adapter: useful work of live components over the overhead. Floors are computed.",
    ]
    for title, block in groupby(rows, _title):
        members = list(block)
        cells = [list(_COLUMNS), *([show(row) for show in _COLUMNS.values()] for row in members)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", f"{title}, {len(members[0].samples_s)} rounds"]
        for first, *others in cells:
            aligned = [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            ]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def write(path: Path, rows: list[Row], about: dict[str, Any]) -> Path:
    """Writes all as JSON to a file, or into a folder under the device's name; returns the file."""
    if path.suffix != ".json":
        path.mkdir(parents=True, exist_ok=True)
        path = path / (re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + ".json")
    path.write_text(json.dumps({**about, "rows": [row.record() for row in rows]}, indent=1) + "\n")
    return path


def _title(row: Row) -> str:
    return f"{row.layer} {row.dtype} r{row.max_rank}, {row.mode}"


def _shown(row: Row) -> Any:
    return row.time if row.overhead is None else row.overhead


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "peft", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
