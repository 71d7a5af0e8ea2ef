"""The experts of a Mixture-of-Experts layer with adapters: the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import moe_peers, moe_plain, moe_providers
from benchmarks.floors import Cost, base_cost, lora_cost
from benchmarks.moe_providers import ExpertsOracle, ExpertsProblem
from benchmarks.providers import FORWARD_BACKWARD, MODES, Provider
from benchmarks.race import DTYPES
from benchmarks.shapes import ExpertsShape, mixtral, olmoe, qwen3

BUILDERS = {**moe_providers.BUILDERS, **moe_plain.BUILDERS, **moe_peers.BUILDERS}
MEAN = 16


def uniform(experts: int) -> list[int]:
    """Every expert has the mean rank."""
    return [MEAN] * experts


def bimodal(experts: int) -> list[int]:
    """One expert in five has rank 64, the others 4: mean 16."""
    return [64 if expert % 5 == 0 else 4 for expert in range(experts)]


def zipf(experts: int) -> list[int]:
    """Expert i has a share of 1 / (i + 1) of the budget, at most 256; what rounding leaves goes to the first."""
    budget, total = MEAN * experts, sum(1 / (i + 1) for i in range(experts))
    return [min(int(budget / (i + 1) / total), 256) for i in range(experts)]


def one(experts: int) -> list[int]:
    """One expert has rank 256, the others none."""
    return [256] + [0] * (experts - 1)


def shared(experts: int) -> list[int]:
    """A budget of 2048 components, whatever the number of experts."""
    return [2048 // experts] * experts


RANKS: dict[str, Callable[[int], list[int]]] = {
    "uniform": uniform,
    "bimodal": bimodal,
    "zipf": zipf,
    "one": one,
    "shared": shared,
}


@dataclass(frozen=True)
class Case:
    """One layer, dtype, distribution of ranks by its name in ``RANKS``, and of rows by its name in ``ROUTINGS``.

    ``effort`` is the share of the usual time to spend on it; the lowest ``priority`` comes first. With ``rank`` uniform
    ranks are that, and not ``MEAN``.
    """

    shape: ExpertsShape
    dtype: torch.dtype
    ranks: str
    peers: tuple[str, ...]
    effort: float = 1.0
    modes: tuple[str, ...] = MODES
    routing: str = "random"
    priority: int = 1
    rank: int | None = None

    def __str__(self) -> str:
        return f"{self.layer} {DTYPES[self.dtype]}"

    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""
        return f"{self}".replace(" ", "-").replace(",", "")

    @property
    def layer(self) -> str:
        routing = "" if self.routing == "random" else f", {self.routing} routing"
        return f"{self.shape}, {self.ranks} ranks{routing}"

    @property
    def expert_ranks(self) -> list[int]:
        if self.ranks == "uniform" and self.rank is not None:
            return [self.rank] * self.shape.num_experts
        return RANKS[self.ranks](self.shape.num_experts)

    @property
    def max_rank(self) -> int:
        return max(self.expert_ranks)

    @property
    def mean_rank(self) -> int:
        return sum(self.expert_ranks) // self.shape.num_experts

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, mean rank)."""
        return {
            name: (name, 0 if name.startswith("base") or name in moe_peers.TRAIN_THE_WEIGHTS else self.mean_rank)
            for name in ("base", "lrlora", *self.peers)
        }

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """The providers of one random problem, and its oracle."""
        problem = ExpertsProblem.random(self.shape, self.dtype, self.expert_ranks, device, self.routing)
        return lambda builder, _: BUILDERS[builder](problem), ExpertsOracle(problem).check

    def work(self, provider: Provider, mode: str) -> Cost:
        """What has to be done: the base layer's work, or that of the mean rank in every expert."""
        size, backward = self.dtype.itemsize, mode == FORWARD_BACKWARD
        if provider.rank == 0:
            return base_cost(self.shape, size, backward=backward)
        return lora_cost(self.shape, self.mean_rank, size, size, backward=backward)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """All cases for a device, the main ones first; or a tiny one that shows that the suite runs."""
    if quick:
        tiny = ExpertsShape("tiny", 40, 6, 2, 24, 16)
        return [Case(tiny, torch.float32, "uniform", ("PEFT", "PEFT, accelerated", "base, eager"), 0.05)]
    if device.type == "cuda":
        return _on_a_gpu()
    peers = ("base, eager", "PEFT")
    training = partial(Case, modes=(FORWARD_BACKWARD,))  # a round of them all takes up to a minute
    layers = [make(tokens) for tokens in (1024, 256, 4096) for make in (olmoe, qwen3)]
    selected = [training(layer, dtype, "uniform", peers) for layer in layers for dtype in DTYPES_ON_CPU]
    accelerated = ("PEFT", "PEFT, accelerated")
    selected += [training(olmoe(512), dtype, "uniform", accelerated) for dtype in DTYPES_ON_CPU]
    padded = ("lrlora, padded",)
    selected += [training(olmoe(1024), torch.float32, ranks, padded) for ranks in ("bimodal", "zipf", "one")]
    sweep = [ExpertsShape("sweep", 512, experts, 8, 1024, 512) for experts in (8, 32, 128, 256)]
    return selected + [training(shape, torch.float32, ranks, ()) for ranks in ("shared", "uniform") for shape in sweep]


def _on_a_gpu() -> list[Case]:
    """The case of one priority takes turns with the next by name: OLMoE, Qwen3, Mixtral."""
    adapters = ("PEFT", "PEFT, accelerated", "split grouped_mm")
    peers = (*adapters, "axolotl", "ScatterMoE", "Liger")
    bf16, training = partial(Case, dtype=torch.bfloat16), (FORWARD_BACKWARD,)
    selected = [bf16(olmoe(8192), ranks="uniform", peers=peers, priority=0)]
    selected += [bf16(qwen3(8192), ranks="uniform", peers=(*peers, "compile"), priority=0)]
    selected += [bf16(mixtral(8192), ranks="uniform", peers=adapters)]
    skewed = partial(bf16, olmoe(8192), modes=training)
    selected += [
        skewed(ranks="bimodal", peers=("lrlora, padded",), priority=0),
        *(skewed(ranks="uniform", peers=("split grouped_mm",), routing=name, priority=0) for name in ("zipf", "hot")),
        *(skewed(ranks=ranks, peers=("lrlora, padded",), priority=2) for ranks in ("zipf", "one")),
    ]
    layers = [make(tokens) for tokens in (4096, 32768) for make in (olmoe, qwen3, mixtral)]
    return selected + [bf16(layer, ranks="uniform", peers=adapters, modes=training, priority=2) for layer in layers]


DTYPES_ON_CPU = (torch.float32, torch.bfloat16)
