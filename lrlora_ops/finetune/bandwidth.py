"""Memory bandwidth of a GPU: what a large copy reaches, beside what the datasheet says."""

from __future__ import annotations

import torch

# Peak bandwidth in bytes per second, of the makers' datasheets; the first name that the device's name contains counts.
DATASHEETS = {
    "B300": 8.0e12,
    "B200": 8.0e12,
    "GH200 144G": 4.9e12,
    "GH200": 4.0e12,
    "H200": 4.8e12,
    "H100 NVL": 3.9e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100-PCIE-40GB": 1.555e12,
    "A100-SXM4-40GB": 1.555e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 2.039e12,
    "L40": 0.864e12,
    "L4": 0.3e12,
    "A10G": 0.6e12,
    "RTX 5090": 1.792e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
    "MI355X": 8.0e12,
    "MI325X": 6.0e12,
    "MI300X": 5.3e12,
}
_LOW = 0.7  # of the datasheet; an H200's 4.3 of 4.8 TB/s are 0.9, and less than this is shared, slowed or broken
_BYTES, _COPIES = 1 << 30, 10


def datasheet(name: str) -> float | None:
    """Bytes per second; None if the device is not in the table."""
    return next((rate for known, rate in DATASHEETS.items() if known.lower() in name.lower()), None)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copies of 1 GiB on the device; it needs 2 GiB there."""
    source = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(_COPIES):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * _BYTES * _COPIES / (1e-3 * start.elapsed_time(end))


def judged(name: str, measured: float) -> tuple[bool, str]:
    """Whether a measured rate is what such a GPU should have, and the comparison in words."""
    rate = datasheet(name)
    text = f"{name} copies {measured / 1e12:.2f} TB/s"
    if rate is None:
        return True, f"{text}; the datasheet of this GPU is not in the table"
    return measured >= _LOW * rate, f"{text}, {measured / rate:.0%} of the datasheet's {rate / 1e12:.2f}"
