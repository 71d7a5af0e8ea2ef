"""Tile sizes of the kernels: data, chosen by the capacity of the rank and the device; the first is the safe one."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows by columns that one program works on, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# block_n is the step along the reduced or written columns: K of shrink, N of the others.
_CUDA = {
    "shrink": {16: Tile(64, 128, 4, 4), 32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)},
    "expand": {16: Tile(64, 128, 4, 2), 32: Tile(64, 128, 4, 2), 64: Tile(64, 128, 4, 2), 128: Tile(64, 128, 4, 2)},
    "gram": {16: Tile(64, 128, 4, 4), 32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)},
    "shrink_gram": {16: Tile(128, 64, 4, 3), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)},
    "reduce": {16: Tile(1, 64, 4, 2), 32: Tile(1, 64, 4, 2), 64: Tile(1, 32, 4, 2), 128: Tile(1, 32, 4, 2)},
}
# 64 KB of shared memory, and a pipeline that pays less for depth.
_HIP = {
    name: {block_r: Tile(tile.block_m, min(tile.block_n, 64), 4, 2) for block_r, tile in tiles.items()}
    for name, tiles in _CUDA.items()
}
CONFIGS = {"cuda": _CUDA, "hip": _HIP}


def backend() -> str:
    """The family of GPUs that this torch is built for: a key of CONFIGS."""
    return "hip" if torch.version.hip else "cuda"


def tile_for(kernel: str, block_r: int) -> Tile:
    """The tile of a kernel on this machine, for a rank capacity of BLOCK_R."""
    return CONFIGS[backend()][kernel][block_r]
