"""``python -m benchmarks.docs``: writes the tables of docs/performance.md, scale.md and sinc.md, which no hand writes.

A table stands between ``<!-- begin NAME -->`` and ``<!-- end -->``; the text around it is a person's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from benchmarks import goals, report, scale
from benchmarks.floors import H200, Cost, accumulating_cost, base_cost, lora_cost, sinc_cost, sinc_passes_cost
from benchmarks.shapes import LONG_SHAPES, mixtral, olmoe, qwen3

FOLDER = Path(__file__).parents[1] / "docs"
PAGES = ("performance.md", "scale.md", "sinc.md")
_BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_RESULTS = {  # heading -> what stands there
    "provider": lambda row: row["provider"],
    "ms": lambda row: report.number(row["time"]["median"]),
    "overhead ms": lambda row: report.number(row["overhead"] and row["overhead"]["median"]),
    "p20..p80": lambda row: report.spread(row["overhead"] or row["time"]),
    "of base": lambda row: "" if row["overhead_to_base"] is None else f"{row['overhead_to_base']:.0%}",
    "/ PEFT": lambda row: report.number(row["overhead_to_peft"]),
    "floor ms": lambda row: report.number(row["floor_ms"]),
    "peak +MB": lambda row: f"{row['peak_extra_mb']:.0f}",
    "by": lambda row: row.get("timer", "clock"),
}


def results() -> str:
    """Every results file of the suite, the newest first."""
    return "\n".join(line for path in reversed(report.files()) for line in _file(path))


def _file(path: Path) -> Iterator[str]:
    content = json.loads(path.read_text())
    yield f"### {path.stem}\n"
    yield " · ".join(report.heading(content)) + "\n"
    if parity := content.get("parity"):
        failed = ", ".join(parity["failed"]) or "none"
        yield f"Parity tests: {parity['passed']} passed, failed: {failed}, {parity['not_run']} not run.\n"
    if cells := goals.table(content):
        yield from markdown(cells)
        yield ""
    cells = [["layer, mode", *_RESULTS]]
    for title, block in groupby(content["rows"], report.title_of):
        for first, row in enumerate(block):
            cells.append(["" if first else title, *(show(row) for show in _RESULTS.values())])
    yield from markdown(cells)
    yield ""
    if missing := report.left_out(content):
        yield from (f"- Not timed: {line}" for line in missing)
        yield ""


def floors() -> str:
    """The least time of the adapter on an H200, dense and MoE, from bytes and operations."""
    dense = [["M, K, N", "base ms", "base accumulates, r 16", "floor, r 16", "floor, r 128"]]
    for shape in LONG_SHAPES:
        costs = (base_cost(shape), accumulating_cost(shape, 16), lora_cost(shape, 16), lora_cost(shape, 128))
        dense.append([f"{shape.M}, {shape.K}, {shape.N}", *map(_milliseconds, costs)])
    experts = [["layer", "tokens", "base ms", "floor, r 16", "of base"]]
    for make in (olmoe, qwen3, mixtral):
        for tokens in (4096, 8192, 32768):
            layer = make(tokens)
            base, lora = base_cost(layer), lora_cost(layer, 16)
            share = f"{lora.floor_ms(H200) / base.floor_ms(H200):.1%}"
            experts.append([layer.model, str(tokens), _milliseconds(base), _milliseconds(lora), share])
    return "\n".join([*markdown(dense), "", *markdown(experts)])


def sinc() -> str:
    """The least time of SincUpdate on an H200, forward and backward, rank 16."""
    cells = [["M, K, N", "base ms", "third product ms", "passes ms", "all", "of base"]]
    for shape in LONG_SHAPES:
        base, passes, added = base_cost(shape), sinc_passes_cost(shape, 16), sinc_cost(shape, 16)
        product = Cost(added.bytes - passes.bytes, added.flops - passes.flops)
        parts = [cost.floor_ms(H200) for cost in (base, product, passes)]
        sizes = f"{shape.M}, {shape.K}, {shape.N}"
        cells.append([sizes, *(f"{ms:.3g}" for ms in (*parts, sum(parts))), f"{sum(parts) / parts[0]:.2f}x"])
    return "\n".join(markdown(cells))


def _milliseconds(cost: Cost) -> str:
    return f"{cost.floor_ms(H200):.3g}"


def markdown(cells: list[list[str]]) -> Iterator[str]:
    """Lines of a table, the first row the heading."""
    heading, *rows = cells
    yield f"| {' | '.join(heading)} |"
    yield "|" + "---|" * len(heading)
    yield from (f"| {' | '.join(row)} |" for row in rows)


BLOCKS: dict[str, Callable[[], str]] = {"results": results, "floors": floors, "scale": scale.page, "sinc": sinc}


def render(text: str) -> str:
    """A page with its tables as they are now."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{BLOCKS[found[2]]().rstrip()}\n{found[3]}"

    return _BLOCK.sub(block, text)


def update(folder: Path = FOLDER) -> list[Path]:
    """Write the pages that have changed; returns them."""
    changed: list[Path] = []
    for path in (folder / name for name in PAGES):
        before = path.read_text()
        if (after := render(before)) != before:
            path.write_text(after)
            changed.append(path)
    return changed


def main() -> None:
    for path in update() or ["nothing has changed"]:
        print(path)


if __name__ == "__main__":
    main()
