"""``python -m benchmarks.static``: compiles every kernel in every shipped config for four GPU targets, without a GPU.

Prints what the compiled code is made of, and per launch the work and its lower bound. All of it is read off the code
or computed from shapes; nothing is measured.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.floors import H200, launch_cost
from benchmarks.static_report.cases import PRIMITIVES, RANKLESS, Case, cases, launch
from benchmarks.static_report.code import Code, read_codes
from benchmarks.static_report.table import layer_floors, table
from benchmarks.static_report.targets import TARGETS, Target
from lrlora_ops.kernels._capture import Launch, capture

_TILE = ("BLOCK_M", "BLOCK_S", "BLOCK_N", "BLOCK_K", "BLOCK_R")


def compile_cases(selected: Sequence[Case]) -> list[dict[str, Any]]:
    """One row per kernel that the cases, all of one target, launch."""
    target = TARGETS[selected[0].target]
    launches = [(case, launched) for case in selected for launched in capture(target.gpu, partial(launch, case))]
    compiled = {launched.compiled.hash: launched.compiled for _, launched in launches}  # several may launch the same
    codes = dict(zip(compiled, read_codes([*compiled.values()]), strict=True))
    return [_row(case, target, launched, codes[launched.compiled.hash]) for case, launched in launches]


def _row(case: Case, target: Target, launched: Launch, code: Code) -> dict[str, Any]:
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
        "scalar_spills": code.scalar_spills,
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
    batches = [list(batch) for _, batch in groupby(selected, lambda case: (case.target, case.primitive, case.capacity))]
    with ExitStack() as stack:
        compiled = map(compile_cases, batches)
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            compiled = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context)).map(compile_cases, batches)
        per_batch = list(track(compiled, "Compiling", len(batches), console=console, transient=True))
    return [row for rows in per_batch for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.replace("``", ""))
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), help="default: all four")
    parser.add_argument("--quick", action="store_true", help="a part for tests: bf16's widest tiles, and on sm_90 more")
    parser.add_argument("--primitive", nargs="+", choices=[*PRIMITIVES, *RANKLESS], help="default: all")
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
    selected = cases(arguments.target or list(TARGETS), arguments.quick)
    selected = [case for case in selected if case.primitive in (arguments.primitive or [case.primitive])]
    rows = report(selected, arguments.jobs, console)
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
