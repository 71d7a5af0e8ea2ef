"""What is said about a run's results: where they were measured, and a table for a terminal.

``python -m benchmarks.report [FILE]`` prints the table of a results file again.
"""

from __future__ import annotations

import argparse
import json
import os
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
from benchmarks import goals
from benchmarks.floors import Machine
from benchmarks.results_file import FOLDER

Row = dict[str, Any]

_COLUMNS = {  # heading -> what stands there
    "provider": lambda row: row["provider"],
    "ms": lambda row: number(row["time"]["median"]),
    "overhead ms": lambda row: number(row["overhead"] and row["overhead"]["median"]),
    "p20..p80": lambda row: spread(row["overhead"] or row["time"]),
    "of base": lambda row: "" if row["overhead_to_base"] is None else f"{row['overhead_to_base']:.1%}",
    "/ PEFT": lambda row: number(row["overhead_to_peft"]),
    "floor ms": lambda row: number(row["floor_ms"]),
    "GFLOP/s": lambda row: number(row["tflops"] and 1e3 * row["tflops"]),
    "GB/s": lambda row: number(row["gb_per_s"]),
    "peak +MB": lambda row: f"{row['peak_extra_mb']:.1f}",
    "saved MB": lambda row: "" if row["saved_mb"] is None else f"{row['saved_mb']:.2f}",
    "by": lambda row: row.get("timer", ""),
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
        "commit": commit(),
        "versions": {"lrlora_ops": lrlora_ops.__version__, "python": platform.python_version(), **_versions()},
        "machines": [asdict(machine) for machine in machines],
    }


def heading(content: dict[str, Any]) -> list[str]:
    """Where, when and with what the results were measured, and the machine's own rates: a line each."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return [
        f"{content['device']}, {content['threads']} threads, {content['date']}, commit {content['commit']}",
        versions,
        *(
            f"{m['name']}: copy {m['bandwidth'] / 1e9:.4g} GB/s, matmul {m['flops'] / 1e9:.4g} GFLOP/s"
            for m in content["machines"]
        ),
    ]


def text(content: dict[str, Any], with_goals: bool = True) -> str:
    """The results for a terminal: a block per case and mode, who was left out, and the goals of the suite."""
    lines = [
        *heading(content),
        "Overhead: median over rounds of what a provider took beyond the base layer in the same round, with its",
        "p20..p80. Rates of an adapter: useful work of live components over the overhead. Floors are computed.",
    ]
    for title, block in groupby(content["rows"], title_of):
        cells = [[show(row) for show in _COLUMNS.values()] for row in block]
        lines += ["", title, *aligned([list(_COLUMNS), *cells])]
    if content.get("left_out"):
        lines += ["", "Not timed:", *left_out(content)]
    if with_goals and (rows := goals.table(content)):
        lines += ["", *aligned(rows)]
    return "\n".join(lines)


def left_out(content: dict[str, Any]) -> list[str]:
    """Who was not timed, and why: a line per provider and reason, with the number of entries."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in content.get("left_out", []):
        found.setdefault((entry["provider"], entry["reason"]), []).append(entry["case"])
    return [
        f"{provider}: {reason} ({len(set(cases))} case{'s' if len(set(cases)) > 1 else ''}, first {cases[0]})"
        for (provider, reason), cases in found.items()
    ]


def aligned(cells: list[list[str]]) -> list[str]:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        ).rstrip()
        for first, *others in cells
    ]


def title_of(row: Row) -> str:
    return f"{row['layer']} {row['dtype']} r{row['max_rank']}, {row['mode']}"


def spread(value: dict[str, float]) -> str:
    return f"{number(value['p20'])}..{number(value['p80'])}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def commit() -> str:
    """The commit of the source tree, or what LRLORA_COMMIT says of a copy that has no history."""
    if named := os.environ.get("LRLORA_COMMIT"):
        return named
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


def files() -> list[Path]:
    """The results files of the suite, the newest last."""
    read = ((json.loads(path.read_text()), path) for path in FOLDER.glob("*.json"))
    found = [(content["date"], path) for content, path in read if "machines" in content]
    return [path for _, path in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="The table of a results file.")
    parser.add_argument("file", type=Path, nargs="*", help="default: the newest of benchmarks/results/")
    arguments = parser.parse_args()
    for path in arguments.file or files()[-1:]:
        try:
            content = json.loads(path.read_text())
            print(f"{path}\n{text(content)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path} is not a results file of the benchmarks: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
