"""``python -m benchmarks.static``: compiles every kernel in every shipped config for four GPU targets, without a GPU.

Prints what the compiled code is made of, and per launch the work and its lower bound. All of it is read off the code
or computed from shapes; nothing is measured.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.floors import H200, launch_cost
from benchmarks.static_report.capture import Launch, capture
from benchmarks.static_report.cases import Case, cases, launch
from benchmarks.static_report.code import read_code
from benchmarks.static_report.table import layer_floors, table
from benchmarks.static_report.targets import TARGETS, Target

_TILE = ("BLOCK_M", "BLOCK_S", "BLOCK_N", "BLOCK_K", "BLOCK_R")


def compile_case(case: Case) -> list[dict[str, Any]]:
    """One row per kernel that the case launches."""
    target = TARGETS[case.target]
    return [_row(case, target, launched) for launched in capture(target, partial(launch, case))]


def _row(case: Case, target: Target, launched: Launch) -> dict[str, Any]:
    code = read_code(launched.compiled)
    metadata = launched.compiled.metadata
    cost = launch_cost(launched.kernel, launched.arguments)
    blocks = target.blocks_per_multiprocessor(code.registers, code.shared, metadata.num_warps)
    return {
        "target": case.target,
        "kernel": launched.kernel,
        "primitive": case.primitive,
        "dtypes": case.dtypes,
        "layout": case.layout,
        "capacity": case.capacity,
        "tile": " ".join(f"{name[-1]}{launched.arguments[name]}" for name in _TILE if name in launched.arguments),
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "grid": list(launched.grid),
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "shared_limit": target.max_block_shared,
        "matrix": code.matrix,
        "wide_loads": code.wide_loads,
        "loads": code.loads,
        "blocks": blocks,
        "occupancy": blocks * metadata.num_warps / target.max_warps,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "floor_ms": cost.floor_ms(H200),
        "hash": launched.compiled.hash,
    }


def report(selected: list[Case], jobs: int, console: Console) -> list[dict[str, Any]]:
    """The rows of all cases, in order."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_case, selected)
        per_case = list(track(compiled, "Compiling", len(selected), console=console, transient=True))
    return [row for rows in per_case for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.replace("``", ""))
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), help="default: all four")
    parser.add_argument("--quick", action="store_true", help="a representative part, for tests")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compiler processes")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a directory; make it first")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    rows = report(cases(arguments.target or list(TARGETS), arguments.quick), arguments.jobs, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    for target in TARGETS:
        of_target = [row for row in rows if row["target"] == target]
        if of_target:
            console.print(table(target, of_target))
    for line in layer_floors(rows):
        console.print(line)


if __name__ == "__main__":
    main()
