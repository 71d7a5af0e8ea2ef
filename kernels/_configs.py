"""Tile sizes of the kernels: data, chosen by the capacity of the rank, the dtype and the device."""

from dataclasses import dataclass
from functools import cache

import torch

from lrlora_ops.kernels._measured import MEASURED


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
    "sinc_weight": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 64, 4, 2)),
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
    "adapter_gradients": _tiles((32, 64, 16, 8, 3), (32, 64, 32, 8, 3), (16, 32, 64, 4, 3), (16, 32, 128, 4, 3)),
    "sinc_weight": _tiles((64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    "sinc_gradients": _tiles((64, 16, 16, 8, 1), (64, 16, 32, 8, 1), (64, 16, 32, 8, 1), (64, 16, 32, 8, 1)),
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
    "sinc_weight": _tiles((64, 32, 16, 4, 2), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 64, 4, 2)),
    "sinc_gradients": _tiles((64, 16, 16, 4, 1), (64, 16, 32, 4, 1), (64, 16, 64, 4, 1), (64, 16, 64, 4, 1)),
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
    "sinc_gradients": _tiles((64, 16, 16, 8, 1), (64, 16, 32, 8, 1), (64, 16, 32, 8, 1), (64, 16, 32, 8, 1)),
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


@cache
def measured() -> dict[tuple[str, int, int], Tile]:
    """The tiles that were measured on this machine's GPU; they go before those above."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {key: Tile(*fields) for key, fields in MEASURED.get(device, {}).items()}


def tile_for(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel on this machine, for U and V of ``width`` columns and a product of tiles of ``dtype``."""
    capacity = min(width, 128)
    shipped = CONFIGS[backend(), dtype.itemsize][kernel][capacity]
    return measured().get((kernel, capacity, dtype.itemsize), shipped)


def gemm_tile(rows_per_expert: int, dtype: torch.dtype) -> Tile:
    """The tile of a base product on this machine: the larger one for experts that fill it."""
    shipped = GEMM_CONFIGS[backend(), dtype.itemsize]
    many = int(rows_per_expert >= shipped[1].block_m)
    return measured().get(("grouped_gemm", many, dtype.itemsize), shipped[many])
