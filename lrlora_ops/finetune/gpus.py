"""Known GPUs: what their makers' datasheets say, dense and without sparsity. Nothing here is measured."""

from __future__ import annotations

from lrlora_ops.plan import Gpu

# Bytes per second, bf16 FLOP per second. A device is the first one whose name its own contains.
GPUS = {
    "B200": Gpu(8.0e12, 2250e12),
    "GH200 144G": Gpu(4.9e12, 989e12),
    "GH200": Gpu(4.0e12, 989e12),
    "H200": Gpu(4.8e12, 989e12),
    "H100 NVL": Gpu(3.9e12, 835e12),
    "H100 PCIe": Gpu(2.0e12, 756e12),
    "H100": Gpu(3.35e12, 989e12),
    "A100-PCIE-40GB": Gpu(1.555e12, 312e12),
    "A100-SXM4-40GB": Gpu(1.555e12, 312e12),
    "A100 80GB PCIe": Gpu(1.935e12, 312e12),
    "A100": Gpu(2.039e12, 312e12),
    "L40S": Gpu(0.864e12, 362e12),
    "L4": Gpu(0.3e12, 121e12),
    "RTX 4090": Gpu(1.008e12, 165e12),
    "RTX 3090": Gpu(0.936e12, 71e12),
    "MI355X": Gpu(8.0e12, 2500e12),
    "MI325X": Gpu(6.0e12, 1307e12),
    "MI300X": Gpu(5.3e12, 1307e12),
}


def known_gpu(name: str) -> Gpu | None:
    """Of the device's name, or a part of it that is in the table; None if it is not."""
    return next((gpu for known, gpu in GPUS.items() if known.lower() in name.lower()), None)
