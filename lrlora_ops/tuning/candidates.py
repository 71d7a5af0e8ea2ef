"""Which tiles are worth compiling: the shipped one first, and all others of a grid that may fit."""

from __future__ import annotations

from itertools import product

from lrlora_ops.kernels._configs import Tile
from lrlora_ops.kernels._user_tiles import Key

_BLOCKS = {2: (32, 64, 128, 256), 4: (16, 32, 64, 128)}  # by bytes of an element
_WARPS, _STAGES = (4, 8), (2, 3, 4, 5)
# Tiles of a weight, rows and columns: phi takes registers for each element, and there is little to load ahead.
_SINC = ("sinc_weight", "sinc_gradients")
_SINC_ROWS, _SINC_COLUMNS, _SINC_STAGES = (32, 64, 128), (16, 32, 64), (1, 2, 3)
_MOST_ACCUMULATORS = 128  # registers per thread, of 255; the operands need some too


def candidates(key: Key, shipped: Tile, max_shared: int) -> list[Tile]:
    """The shipped tile, then all others whose pipeline fits into ``max_shared`` bytes by a rough count.

    The step along the rank is the shipped one, but for expand; the base product's along K is 32 or 64.
    """
    kernel, capacity, itemsize = key[:3]
    steps = {"expand": (16, 32), "grouped_gemm": (32, 64) if itemsize == 2 else (16, 32)}.get(
        kernel, (shipped.block_r,)
    )
    blocks = _BLOCKS[itemsize]
    rows, columns, depths = (_SINC_ROWS, _SINC_COLUMNS, _SINC_STAGES) if kernel in _SINC else (blocks, blocks, _STAGES)
    found = [shipped]
    for block_m, block_n, step, warps, stages in product(rows, columns, steps, _WARPS, depths):
        tile = Tile(block_m, block_n, step, warps, stages)
        if tile == shipped or (kernel == "expand" and step > capacity):
            continue
        if shared_bytes(key, tile) <= max_shared and accumulators(key, tile) <= _MOST_ACCUMULATORS:
            found.append(tile)
    return found


def shared_bytes(key: Key, tile: Tile) -> int:
    """What the stages of a tile's pipeline hold: the operands of one step."""
    m, n, r = tile.block_m, tile.block_n, tile.block_r
    steps = {
        "expand": m * r + r * n,
        "grouped_gemm": m * r + r * n,
        "gated_shrink": 2 * m * n + n * r,
        "gated_shrink_backward": 3 * m * n + 2 * n * r,
        "sinc_weight": m * r + r * n,
        "sinc_gradients": 2 * m * n + m * r + r * n,
    }
    return tile.num_stages * key[2] * steps.get(key[0], m * n + max(m, n) * r)


def accumulators(key: Key, tile: Tile) -> float:
    """fp32 registers per thread for the sums of a tile, of 32 threads in a warp.

    Beside those of d_b, sinc_gradients has nine moments, each of four sums for a row.
    """
    along_rows = ("shrink", "shrink_gram", "gated_shrink", "gated_shrink_backward")
    sides = dict.fromkeys(along_rows, (tile.block_m, tile.block_r))
    sides |= dict.fromkeys(("gram", "adapter_gradients"), (tile.block_n, tile.block_r))
    sides["sinc_gradients"] = (tile.block_m, tile.block_r + 9 * 4)
    m, n = sides.get(key[0], (tile.block_m, tile.block_n))
    return m * n / (32 * tile.num_warps)
