"""The launchers, under the names that ``lrlora_ops.eager`` has too."""

from lrlora_ops.kernels.combine import combine
from lrlora_ops.kernels.dropout import dropout
from lrlora_ops.kernels.expand import expand
from lrlora_ops.kernels.gram import gram
from lrlora_ops.kernels.grouped_gemm import grouped_gemm
from lrlora_ops.kernels.shrink import shrink
from lrlora_ops.kernels.shrink_gram import shrink_gram

__all__ = [
    "combine",
    "dropout",
    "expand",
    "gram",
    "grouped_gemm",
    "shrink",
    "shrink_gram",
]
