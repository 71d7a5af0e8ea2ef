"""``python -m benchmarks.scale``: what adapters of experts cost on 1 to 4096 GPUs, from arithmetic alone.

A component of an expert is a row of A and a row of B in both projections, ``(H + 2 I) + (I + H)`` parameters. Held as
it is owned, an adapter has ``layers * experts * mean rank`` of them; padded to the largest rank and masked, it has
``layers * experts * max rank``, and its parameters, gradients, optimizer state and collectives grow by that factor.

FSDP shards everything over all N GPUs. Each step a GPU receives all other shards in forward and again in backward
(two all-gathers), and sends its part of the gradients to their owners (a reduce-scatter): ``(N - 1) / N`` of the bytes
each. With expert parallelism over P GPUs the adapter of an expert stays where the expert is; the ``D = N / P`` replicas
average its gradients by an all-reduce, ``2 (D - 1) / D`` of the bytes that a GPU holds. Each step those who average
gradients also average one fp32 number per component and projection, the sensitivity, and two per expert, its demand in
rows and in routing weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GPUS = (1, 8, 64, 512, 4096)
MEAN_RANK, MAX_RANK = 16, 64
# fp32: the parameter, its gradient, and Adam's two moments. Collectives move fp32 too.
_PARAMETER, _GRADIENT, _MOMENTS = 4, 4, 8
_LINK = 50e9  # bytes per second and GPU, one 400 Gbit/s port: an assumption, of which the times are a multiple


@dataclass(frozen=True)
class Model:
    """The routed experts of a model, and the most GPUs that they are usually spread over."""

    name: str
    layers: int
    num_experts: int
    hidden: int
    intermediate: int
    expert_parallel: int

    def parameters(self, rank: int) -> int:
        """Of the adapters of all experts, both projections, with ``rank`` components each on the average."""
        return self.layers * self.num_experts * rank * (2 * self.hidden + 3 * self.intermediate)

    def statistics(self, rank: int) -> int:
        """Numbers that are averaged each step for the method: sensitivities and demands."""
        return self.layers * self.num_experts * (2 * rank + 2)


# From the models' config.json: num_hidden_layers (of which DeepSeek's first three are dense), the routed experts,
# hidden_size and moe_intermediate_size.
MODELS = (
    Model("Qwen3-235B-A22B", 94, 128, 4096, 1536, expert_parallel=64),
    Model("DeepSeek-V3", 61 - 3, 256, 7168, 2048, expert_parallel=64),
)


@dataclass(frozen=True)
class Share:
    """What one GPU holds, and what it sends in a step, in bytes."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float  # all-gathers
    reduced: float  # reduce-scatters and all-reduces
    statistics: float

    @property
    def held(self) -> float:
        return self.parameters + self.gradients + self.optimizer

    @property
    def sent(self) -> float:
        return self.gathered + self.reduced + self.statistics


def ring(gpus: int) -> float:
    """Of some bytes, the part that a GPU sends in a reduce-scatter or an all-gather by ring among so many."""
    return (gpus - 1) / gpus


def fsdp(model: Model, rank: int, gpus: int) -> Share:
    """Everything sharded over all GPUs."""
    count = model.parameters(rank)
    return Share(
        parameters=_PARAMETER * count / gpus,
        gradients=_GRADIENT * count / gpus,
        optimizer=_MOMENTS * count / gpus,
        gathered=2 * _PARAMETER * count * ring(gpus),
        reduced=_GRADIENT * count * ring(gpus),
        statistics=2 * 4 * model.statistics(rank) * ring(gpus),
    )


def expert_parallel(model: Model, rank: int, gpus: int) -> Share:
    """Experts, with their adapters, spread over up to ``model.expert_parallel`` GPUs; whole replicas of that."""
    spread = min(gpus, model.expert_parallel)
    count = model.parameters(rank) / spread
    return Share(
        parameters=_PARAMETER * count,
        gradients=_GRADIENT * count,
        optimizer=_MOMENTS * count,
        gathered=0.0,
        reduced=2 * _GRADIENT * count * ring(gpus // spread),
        statistics=2 * 4 * model.statistics(rank) / spread * ring(gpus // spread),
    )


SCHEMES = {"FSDP": fsdp, "expert parallel": expert_parallel}


def page() -> str:
    """The tables of docs/scale.md."""
    lines: list[str] = []
    for model in MODELS:
        own, padded = model.parameters(MEAN_RANK), model.parameters(MAX_RANK)
        lines += [
            f"### {model.name}",
            "",
            f"{model.layers} layers of {model.num_experts} routed experts, {model.hidden}/{model.intermediate}: "
            f"{own / 1e9:.2f} billion adapter parameters at mean rank {MEAN_RANK}, "
            f"{padded / 1e9:.2f} billion padded to {MAX_RANK}.",
            "",
            *_table(model),
            "",
        ]
    return "\n".join(lines)


def _table(model: Model) -> Iterator[str]:
    yield (
        "| scheme | GPUs | ranks | parameters GB | gradients GB | optimizer GB | held GB | all-gather GB | reduce GB "
        f"| statistics MB | ms at {_LINK / 1e9:.0f} GB/s |"
    )
    yield "|" + "---|" * 11
    for scheme, share_of in SCHEMES.items():
        for gpus in GPUS:
            for name, rank in (("own", MEAN_RANK), ("padded", MAX_RANK)):
                share = share_of(model, rank, gpus)
                sizes = (share.parameters, share.gradients, share.optimizer, share.held, share.gathered, share.reduced)
                yield (
                    f"| {scheme} | {gpus} | {name} | {' | '.join(_figure(size / 1e9) for size in sizes)} "
                    f"| {_figure(share.statistics / 1e6)} | {_figure(1e3 * share.sent / _LINK)} |"
                )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    print(__doc__, page(), sep="\n")


if __name__ == "__main__":
    main()
