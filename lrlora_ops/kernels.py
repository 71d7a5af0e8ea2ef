"""Import name of the Triton kernels: the folder ``lrlora_ops/kernels/`` of a wheel, ``kernels/`` of a source tree."""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
__path__ = [str(_installed if _installed.is_dir() else Path(__file__).parents[1] / "kernels")]
