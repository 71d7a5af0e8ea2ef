"""Methods: who decides the ranks. One file each, and they know models only through ``RankTable``."""

from lrlora_ops.methods.base import Method, Policy
from lrlora_ops.methods.dynamic import DynamicRank
from lrlora_ops.methods.fixed import FixedRank
from lrlora_ops.methods.learned import LearnedRank
from lrlora_ops.methods.sinc import SincUpdate

__all__ = ["DynamicRank", "FixedRank", "LearnedRank", "Method", "Policy", "SincUpdate"]
