"""Known GPUs: what their makers' datasheets say, dense and without sparsity. Nothing here is measured."""

from __future__ import annotations

import re

from lrlora_ops.plan import Gpu

# Bytes per second, bf16 FLOP per second with fp32 sums. Most makers' figures are with sparsity, twice the dense ones
# here. A device is the first one whose name is in its own as whole words: an "L40" is no "L4". Where units and a clock
# are given, the FLOPs are their product: 4096 in a clock of Hopper's multiprocessors, 1024 of A10's and of CDNA2's
# compute units, 512 of GeForce's Ampere and of A10G's, whose fp32 sums go at half the rate.
GPUS = {
    # NVIDIA Blackwell datasheet of GB200 NVL72 and HGX B200, per GPU: 8 TB/s and 5 PFLOPS, 7.7 TB/s and 4.5 PFLOPS.
    "GB200": Gpu(8.0e12, 2500e12),
    "B200": Gpu(7.7e12, 2250e12),
    # NVIDIA datasheets of GH200, H200 (SXM, NVL) and H100 (SXM, NVL, PCIe; PCIe also product brief PB-11133). GH200 has
    # the 132 multiprocessors at 1.83 GHz of H100 SXM. Of both NVL: 1,671 TFLOPS with sparsity.
    "GH200 144G": Gpu(4.9e12, 989e12),
    "GH200": Gpu(4.0e12, 989e12),
    "H200 NVL": Gpu(4.8e12, 835e12),
    "H200": Gpu(4.8e12, 989e12),
    "H100 NVL": Gpu(3.9e12, 835e12),
    "H100 PCIe": Gpu(2.0e12, 756e12),
    "H100": Gpu(3.35e12, 989e12),
    # NVIDIA A100 datasheet: 40 GB of both forms, 80 GB PCIe, 80 GB SXM.
    "A100-PCIE-40GB": Gpu(1.555e12, 312e12),
    "A100-SXM4-40GB": Gpu(1.555e12, 312e12),
    "A100 80GB PCIe": Gpu(1.935e12, 312e12),
    "A100": Gpu(2.039e12, 312e12),
    # NVIDIA datasheets of A40, A10, L40, L40S and L4; the A10G is Amazon's A10. A10: 72 multiprocessors at 1.695 GHz;
    # A10G: 80 at 1.71 GHz.
    "A40": Gpu(0.696e12, 149.7e12),
    "A10G": Gpu(0.6e12, 70e12),
    "A10": Gpu(0.6e12, 125e12),
    "L40S": Gpu(0.864e12, 362e12),
    "L40": Gpu(0.864e12, 181e12),
    "L4": Gpu(0.3e12, 121e12),
    # NVIDIA whitepapers on the RTX Blackwell, Ada and Ampere GA102 architectures. RTX 3090 Ti: 84 multiprocessors at
    # 1.86 GHz, 384 bits at 21 Gb/s; RTX 3090: 82 at 1.695 GHz.
    "RTX 5090": Gpu(1.792e12, 209.5e12),
    "RTX 4090": Gpu(1.008e12, 165e12),
    "RTX 3090 Ti": Gpu(1.008e12, 80e12),
    "RTX 3090": Gpu(0.936e12, 71e12),
    # AMD Instinct datasheets; a MI250 or MI250X is two devices, each with half of its 3.2 TB/s and 362 or 383 TFLOPS.
    # MI210 is one such device: 104 compute units at 1.7 GHz.
    "MI355X": Gpu(8.0e12, 2500e12),
    "MI325X": Gpu(6.0e12, 1307e12),
    "MI300X": Gpu(5.3e12, 1307e12),
    "MI250X": Gpu(1.6e12, 191.5e12),
    "MI250": Gpu(1.6e12, 181e12),
    "MI210": Gpu(1.6e12, 181e12),
}
# A laptop's GPU shares no more than the name with the card, and an instance of MIG has a part of the GPU.
_OTHERS = re.compile(r"\b(laptop|mobile|max-q|mig)\b", re.IGNORECASE)


def known_gpu(name: str) -> Gpu | None:
    """Of the device's name, or a part of it that is in the table; None if it is not."""
    if _OTHERS.search(name):
        return None
    return next((gpu for known, gpu in GPUS.items() if re.search(rf"\b{known}\b", name, re.IGNORECASE)), None)
