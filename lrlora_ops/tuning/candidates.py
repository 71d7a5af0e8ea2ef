"""Which tiles are worth compiling: the shipped one first, and all others of a grid that may fit."""

from __future__ import annotations

from itertools import product

from lrlora_ops.kernels._configs import Tile
from lrlora_ops.kernels._user_tiles import Key

_BLOCKS = {2: (32, 64, 128, 256), 4: (16, 32, 64, 128)}  # by bytes of an element
_WARPS, _STAGES = (4, 8), (2, 3, 4, 5)
_MOST_ACCUMULATORS = 128  # registers per thread, of 255; the operands need some too


def candidates(key: Key, shipped: Tile, max_shared: int) -> list[Tile]:
    """The shipped tile, then all others whose pipeline fits into ``max_shared`` bytes by a rough count.

    The step along the rank follows from the capacity, but for expand; the base product's along K is 32 or 64.
    """
    kernel, capacity, itemsize = key[:3]
    steps = {"expand": (16, 32), "grouped_gemm": (32, 64) if itemsize == 2 else (16, 32)}.get(
        kernel, (shipped.block_r,)
    )
    found = [shipped]
    for block_m, block_n, step, warps, stages in product(_BLOCKS[itemsize], _BLOCKS[itemsize], steps, _WARPS, _STAGES):
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
    }
    return tile.num_stages * key[2] * steps.get(key[0], m * n + max(m, n) * r)


def accumulators(key: Key, tile: Tile) -> float:
    """fp32 registers per thread for the sums of a tile, of 32 threads in a warp."""
    along_rows = ("shrink", "shrink_gram", "gated_shrink", "gated_shrink_backward")
    sides = dict.fromkeys(along_rows, (tile.block_m, tile.block_r))
    sides |= dict.fromkeys(("gram", "adapter_gradients"), (tile.block_n, tile.block_r))
    m, n = sides.get(key[0], (tile.block_m, tile.block_n))
    return m * n / (32 * tile.num_warps)
