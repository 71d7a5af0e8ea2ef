"""The launchers, under the names that ``lrlora_ops.eager`` has too."""

from lrlora_ops.kernels.adapter_gradients import adapter_gradients
from lrlora_ops.kernels.combine import combine
from lrlora_ops.kernels.dropout import dropout
from lrlora_ops.kernels.expand import expand
from lrlora_ops.kernels.gated import gated_shrink, gated_shrink_backward
from lrlora_ops.kernels.gram import gram
from lrlora_ops.kernels.grouped_gemm import grouped_gemm
from lrlora_ops.kernels.route import route
from lrlora_ops.kernels.shrink import shrink
from lrlora_ops.kernels.shrink_gram import shrink_gram
from lrlora_ops.kernels.sinc import sinc_gradients, sinc_weight
from lrlora_ops.kernels.sinc_gemm import sinc_gemm, sinc_gemm_backward

__all__ = [
    "adapter_gradients",
    "combine",
    "dropout",
    "expand",
    "gated_shrink",
    "gated_shrink_backward",
    "gram",
    "grouped_gemm",
    "route",
    "shrink",
    "shrink_gram",
    "sinc_gemm",
    "sinc_gemm_backward",
    "sinc_gradients",
    "sinc_weight",
]
