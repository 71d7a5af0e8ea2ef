"""``python -m benchmarks.warm``: compiles what the benchmarks on a GPU launch, in several processes at once.

Each process takes a case, runs this library's providers and those under ``torch.compile`` once, and leaves what was
compiled in the caches of Triton and of Inductor, where the process that measures finds it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks import dense, moe, projection, sinc
from benchmarks.race import Case

_MOST_TOKENS = 8192  # longer cases launch what these do


def all_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of the whole suite, in the order in which they are measured."""
    found: list[Any] = [case for module in (dense, moe, projection, sinc) for case in module.cases(device, quick)]
    return sorted(found, key=lambda case: case.priority)


def compiled_here(builder: str) -> bool:
    """Whether a provider launches kernels that have to be compiled here."""
    return builder.startswith("lrlora") or builder in ("compile", "PEFT, accelerated")


def warm(case: Case, device: torch.device) -> list[str]:
    """Run each such provider of the case once in each mode; returns what went wrong, as the measurement will show."""
    build, _ = case.prepare(device)
    errors = []
    for name, (builder, rank) in case.contenders().items():
        if compiled_here(builder):
            try:
                provider = build(builder, rank)
                for mode in case.modes:
                    provider.step(mode)()
            except Exception as error:
                errors.append(f"{case}, {name}: {type(error).__name__}: {error}")
    return errors


def _warm_by_number(number: int, quick: bool) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return warm(all_cases(device, quick)[number], device)


def selected(cases: Sequence[Case]) -> list[int]:
    """The numbers of the cases whose kernels no other case has."""
    return [number for number, case in enumerate(cases) if getattr(case.shape, "T", 0) <= _MOST_TOKENS]  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--quick", action="store_true", help="the tiny cases, to see that it runs")
    arguments = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = selected(all_cases(device, arguments.quick))
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_warm_by_number, number, arguments.quick) for number in numbers]
        for done, future in enumerate(as_completed(futures), 1):
            errors = [repr(future.exception())] if future.exception() else future.result()
            progress = f"{time.monotonic() - began:4.0f} s  compiled {done} of {len(numbers)} cases"
            print(progress, *errors, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
