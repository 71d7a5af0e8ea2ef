"""The command: arms side by side on a planted task."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.planted.arms import ARMS, serves
from benchmarks.planted.cases import CASES
from benchmarks.planted.trial import STEPS, Result, run


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(1)
    results = []
    print(f"{'seed':>4}  {'method':17}{'loss':>8}{'spearman':>10}{'freeze':>8}{'seconds':>9}  ranks (planted)")
    for seed in args.seeds:
        for method in args.methods:
            start = time.perf_counter()
            results.append(run(args.case, seed, method, args.steps))
            print_row(results[-1], time.perf_counter() - start)
    for method in args.methods:
        losses = [result.loss for result in results if result.method == method]
        print(f"mean  {method:17}{sum(losses) / len(losses):8.4f}")
    if args.json:
        args.json.write_text(json.dumps([result.row() for result in results], indent=1) + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Do learned ranks find the ranks that a task was made with?")
    parser.add_argument("--case", choices=list(CASES), default="dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), help="default: all that the case has")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each arm")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    args.methods = args.methods or [arm for arm in ARMS if serves(arm, args.case)]
    for arm in args.methods:
        if not serves(arm, args.case):
            reason = "divides a layer among its experts; use --case moe"
            if arm == "sinc":
                reason = "chooses no ranks; use --case dense-equal or dense-elementwise"
            parser.error(f"--methods: {arm} {reason}, or leave it out")
    if args.steps < 50:
        parser.error(f"--steps is {args.steps}; it must be at least 50, to have a freeze with steps before and after")
    try:
        if args.json:
            args.json.open("a").close()
    except OSError as problem:
        parser.error(f"--json: cannot write {args.json}: {problem.strerror}; name another file")
    return args


def print_row(result: Result, seconds: float) -> None:
    """One line of the table; ``freeze`` is the jump of the loss when the ranks became integers."""
    jump = f"{result.freeze_jump():.2f}" if result.method == "learned" else "-"
    ranks = " ".join(f"{rank:.3g}({true})" for rank, true in zip(result.ranks, result.planted, strict=True))
    print(
        f"{result.seed:4}  {result.method:17}{result.loss:8.4f}{result.spearman:10.3f}{jump:>8}{seconds:9.1f}  {ranks}",
        flush=True,
    )


if __name__ == "__main__":
    main()
