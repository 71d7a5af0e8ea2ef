"""Tile sizes of the kernels: data, chosen by the capacity of the rank, the dtype, the device and what it was asked."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from lrlora_ops.kernels import _user_tiles
from lrlora_ops.kernels._measured import MEASURED
from lrlora_ops.kernels._user_tiles import Key


@dataclass(frozen=True)
class Tile:
    """What one program works on, and how it is compiled.

    BLOCK_M rows, BLOCK_N columns (the step along K in shrink and gated_shrink, along N in shrink_gram) and BLOCK_R rank
    slots (the step along the rank in expand). Of the sinc kernels the rows are the weight's, the columns its inputs.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def _tiles(*rows: tuple[int, int, int, int, int]) -> dict[int, Tile]:
    """One tile for each capacity: 16, 32, 64, and 128 for all above."""
    return {capacity: Tile(*row) for capacity, row in zip((16, 32, 64, 128), rows, strict=True)}


_CUDA = {
    "shrink": _tiles((64, 128, 16, 4, 4), (64, 128, 32, 8, 4), (64, 64, 64, 4, 5), (64, 64, 128, 8, 4)),
    "expand": _tiles((64, 64, 16, 4, 1), (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (64, 128, 32, 8, 2)),
    "gram": _tiles((64, 128, 16, 4, 4), (64, 128, 32, 8, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 4)),
    "shrink_gram": _tiles((128, 64, 16, 8, 5), (64, 128, 32, 8, 4), (64, 64, 64, 4, 5), (64, 64, 128, 8, 4)),
    "gated_shrink": _tiles((64, 64, 16, 4, 4), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (64, 64, 128, 8, 3)),
    "gated_shrink_backward": _tiles((64, 64, 16, 8, 3), (64, 32, 32, 8, 2), (64, 32, 64, 8, 3), (64, 16, 128, 8, 3)),
    "adapter_gradients": _tiles((64, 128, 16, 4, 4), (64, 128, 32, 8, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 4)),
    "sinc_weight": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    "sinc_gradients": _tiles((64, 16, 16, 4, 1), (64, 16, 32, 4, 1), (64, 16, 64, 4, 1), (64, 16, 64, 4, 1)),
}
# Without tensor cores the operands of a product sit in registers.
_CUDA_FP32 = {
    "shrink": _tiles((64, 32, 16, 4, 3), (64, 32, 32, 4, 3), (64, 32, 64, 4, 3), (64, 64, 128, 8, 2)),
    "expand": _tiles((64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    "gram": _tiles((32, 64, 16, 4, 3), (32, 64, 32, 4, 3), (32, 64, 64, 4, 3), (16, 64, 128, 8, 4)),
    "shrink_gram": _tiles((64, 32, 16, 8, 3), (64, 32, 32, 4, 3), (64, 32, 64, 4, 3), (64, 32, 128, 8, 3)),
    "gated_shrink": _tiles((64, 32, 16, 4, 3), (64, 32, 32, 4, 3), (64, 32, 64, 4, 3), (64, 32, 128, 8, 2)),
    "gated_shrink_backward": _tiles((64, 32, 16, 4, 2), (32, 32, 32, 8, 2), (32, 32, 64, 8, 2), (32, 32, 128, 8, 2)),
    "adapter_gradients": _tiles((32, 64, 16, 8, 3), (32, 64, 32, 8, 3), (16, 32, 64, 4, 3), (16, 32, 128, 8, 3)),
    "sinc_weight": _tiles((64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    "sinc_gradients": _tiles((64, 16, 16, 8, 1), (64, 16, 16, 8, 1), (32, 16, 32, 4, 1), (32, 16, 32, 4, 1)),
}
# 64 KB of shared memory, and a pipeline that pays less for depth.
_HIP = {
    "shrink": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 128, 4, 2)),
    "expand": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    "gram": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 128, 4, 2)),
    "shrink_gram": _tiles((128, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 128, 4, 2)),
    "gated_shrink": _tiles((64, 64, 16, 4, 2), (64, 32, 32, 4, 2), (64, 64, 64, 4, 2), (64, 32, 128, 4, 2)),
    "gated_shrink_backward": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 8, 2), (64, 32, 64, 8, 2), (64, 32, 128, 8, 2)),
    "adapter_gradients": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 128, 4, 2)),
    "sinc_weight": _tiles((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    "sinc_gradients": _tiles((64, 16, 16, 2, 1), (64, 16, 32, 4, 1), (64, 16, 64, 4, 1), (64, 16, 64, 4, 1)),
}
_HIP_FP32 = {
    "shrink": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 128, 4, 2)),
    "expand": _tiles((64, 64, 16, 4, 2), (64, 64, 16, 4, 2), (64, 64, 16, 4, 2), (64, 64, 16, 4, 2)),
    "gram": _tiles((32, 64, 16, 4, 2), (32, 64, 32, 4, 2), (32, 64, 64, 4, 2), (32, 64, 128, 4, 2)),
    "shrink_gram": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 128, 4, 2)),
    "gated_shrink": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 128, 4, 2)),
    "gated_shrink_backward": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 128, 4, 2)),
    "adapter_gradients": _tiles((32, 64, 16, 4, 2), (32, 64, 32, 4, 2), (32, 64, 64, 4, 2), (32, 64, 128, 8, 2)),
    "sinc_weight": _tiles((64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    "sinc_gradients": _tiles((32, 16, 16, 4, 1), (32, 16, 32, 4, 1), (32, 16, 32, 4, 1), (32, 16, 32, 4, 1)),
}
# By family of GPUs and bytes of an element.
CONFIGS = {("cuda", 2): _CUDA, ("cuda", 4): _CUDA_FP32, ("hip", 2): _HIP, ("hip", 4): _HIP_FP32}
# The base product of experts with few rows, and with many; block_r is the step along K.
GEMM_CONFIGS = {
    ("cuda", 2): (Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    ("cuda", 4): (Tile(64, 64, 16, 8, 3), Tile(64, 64, 16, 8, 3)),
    ("hip", 2): (Tile(64, 128, 64, 4, 2), Tile(128, 128, 64, 8, 2)),
    ("hip", 4): (Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 4, 2)),
}


def backend() -> str:
    """The family of GPUs that this torch is built for."""
    return "hip" if torch.version.hip else "cuda"


# Rows per expert count up to here, in powers of two: more change nothing, and a batch that is not full is no new shape.
_MOST_ROWS = 1024
_asked: dict[Key, Tile] | None = None
_pinned: dict[Key, Tile] = {}


def device_name() -> str:
    """This machine's GPU, or nothing."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@cache
def measured() -> dict[tuple[str, int, int], Tile]:
    """The tiles that were measured on a GPU like this machine's for any shape; they go before those above."""
    return {key: Tile(*fields) for key, fields in MEASURED.get(device_name(), {}).items()}


@cache
def user_tiles() -> dict[Key, Tile]:
    """The tiles that ``lrlora tune`` has found on this machine's GPU for shapes of its own; they go before all others.

    Warns:
        UserWarning: Once, if there are tiles that cannot be used.
    """
    if not (device := device_name()):
        return {}
    try:
        found = _user_tiles.load(device, _user_tiles.Identity.here())
    except _user_tiles.UnusableTiles as error:
        again = f"run lrlora tune MODEL again, or remove {_user_tiles.path()}"
        warnings.warn(f"tiles that lrlora tune has found are not used: {error}; {again}", stacklevel=2)
        return {}
    return {key: Tile(*fields) for key, fields in found.items()}


def tables_in_use() -> str:
    """In words: whose tiles the kernels take on this machine, the first that has one for a shape."""
    if not (device := device_name()):
        return "shipped; there is no GPU"
    found, unusable = {}, ""
    try:
        found = _user_tiles.load(device, _user_tiles.Identity.here())
    except _user_tiles.UnusableTiles as error:
        unusable = f"; those of lrlora tune are not used: {error}; run it again"
    counted = {"of lrlora tune": len(found), "measured on this kind of GPU": len(measured())}
    return ", then ".join([*(f"{n} {whose}" for whose, n in counted.items() if n), "shipped"]) + unusable


def tile_for(kernel: str, width: int, dtype: torch.dtype, rows_per_expert: int = 0, *features: int) -> Tile:
    """The tile of a kernel on this machine.

    Args:
        kernel: Its name in ``CONFIGS``.
        width: Columns of U and V.
        dtype: Of the products.
        rows_per_expert: On average; of the sinc kernels, rows of a weight. Tiles are tuned for each bucket of it, and
            for each of ``features``.
        features: Widths of the large operands; of the sinc kernels, columns of a weight and the number of coefficients.
    """
    capacity = min(width, 128)
    shipped = CONFIGS[backend(), dtype.itemsize][kernel][capacity]
    return _choice((kernel, capacity, dtype.itemsize, _bucket(rows_per_expert), features), shipped)


def gemm_tile(rows_per_expert: int, dtype: torch.dtype, *features: int) -> Tile:
    """The tile of a base product on this machine; of those shipped, the larger one for experts that fill it."""
    shipped = GEMM_CONFIGS[backend(), dtype.itemsize]
    many = int(rows_per_expert >= shipped[1].block_m)
    return _choice(("grouped_gemm", many, dtype.itemsize, _bucket(rows_per_expert), features), shipped[many])


def _choice(key: Key, shipped: Tile) -> Tile:
    if _asked is not None:
        _asked[key] = shipped
    return _pinned.get(key) or user_tiles().get(key) or measured().get(key[:3]) or shipped


def _bucket(rows_per_expert: int) -> int:
    """The power of two that is not above it."""
    return min(1 << max(rows_per_expert.bit_length() - 1, 0), _MOST_ROWS)


@contextmanager
def asked() -> Iterator[dict[Key, Tile]]:
    """What launches within ask for, with the tiles that are shipped for it."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


@contextmanager
def pinned(key: Key, tile: Tile) -> Iterator[None]:
    """Launches within that ask for the key get this tile."""
    before = dict(_pinned)
    _pinned[key] = tile
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)
