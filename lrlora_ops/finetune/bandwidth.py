"""Memory bandwidth of a GPU: what a large copy reaches, beside what the datasheet says."""

from __future__ import annotations

import torch

from lrlora_ops.finetune.gpus import known_gpu

_LOW = 0.7  # of the datasheet; an H200's 4.3 of 4.8 TB/s are 0.9, and less than this is shared, slowed or broken
_BYTES, _COPIES = 1 << 30, 10


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
    known = known_gpu(name)
    text = f"{name} copies {measured / 1e12:.2f} TB/s"
    if known is None:
        return True, f"{text}; the datasheet of this GPU is not in the table"
    return (
        measured >= _LOW * known.bandwidth,
        f"{text}, {measured / known.bandwidth:.0%} of the datasheet's {known.bandwidth / 1e12:.2f}",
    )
