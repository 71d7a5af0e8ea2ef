"""The report for people: one table per target, then what the launches of a whole layer cost at least."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.table import Table

from benchmarks.floors import H200, base_cost, lora_cost
from benchmarks.static_report.cases import CAPACITIES, SHAPE

Row = dict[str, Any]

_TEXT: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: row["kernel"].removesuffix("_kernel"),
    "layout": lambda row: row["layout"],
    "dtypes": lambda row: row["dtypes"],
    "tile": lambda row: f"{row['tile']}, {row['warps']} warps, {row['stages']} stages",
    "matrix instructions": lambda row: ", ".join(f"{count} {opcode}" for opcode, count in row["matrix"].items()) or "-",
}
_NUMBERS: dict[str, Callable[[Row], str]] = {
    "r": lambda row: str(row["capacity"] or "-"),
    "regs": lambda row: str(row["registers"]),
    "spills": lambda row: str(row["spills"]),
    "scalar": lambda row: str(row["scalar_spills"]),
    "stack": lambda row: str(row["stack"]),
    "shared": lambda row: f"{row['shared'] / 1024:.0f} KB",
    "16 B loads": lambda row: f"{row['wide_loads']:.0%}",
    "occupancy": lambda row: f"{row['occupancy']:.0%}",
    "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.1f}",
    "floor ms": lambda row: f"{row['floor_ms']:.4f}",
}


def table(target: str, rows: Iterable[Row]) -> Table:
    """The rows of one target; the same code on the same work is one line."""
    result = Table(title=f"{target}; work of {SHAPE} and its floor on an {H200.name}; computed, not measured")
    for name in _TEXT:
        result.add_column(name)
    for name in _NUMBERS:
        result.add_column(name, justify="right")
    cells = [*_TEXT.values(), *_NUMBERS.values()]
    distinct = {(row["hash"], row["bytes"], row["flops"]): row for row in reversed(list(rows))}
    for row in reversed(distinct.values()):
        result.add_row(*(cell(row) for cell in cells))
    return result


def layer_floors(rows: Iterable[Row]) -> Iterator[str]:
    """For each rank, what the launches of one bf16 layer's forward and backward cost at least on the H200."""
    dense = [row for row in rows if (row["target"], row["layout"], row["dtypes"]) == ("sm_90", "dense", "bf16")]
    base = base_cost(SHAPE).floor_ms()
    for rank in CAPACITIES:
        launches = [row for row in dense if row["capacity"] == rank]
        ours = sum(row["floor_ms"] * (2 if row["primitive"] == "expand" else 1) for row in launches)  # y and dx
        best = lora_cost(SHAPE, rank).floor_ms()
        if launches:
            yield (
                f"r = {rank}: LoRA at least {ours:.3f} ms with these launches ({ours / base:.0%} of the base layer's "
                f"{base:.2f} ms), {best:.3f} ms ({best / base:.0%}) if every expand rode on a base product"
            )
