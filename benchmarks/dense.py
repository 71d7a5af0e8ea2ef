"""A dense layer with an adapter: the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks import dense_peers, providers
from benchmarks.floors import Cost, base_cost, lora_cost
from benchmarks.providers import FORWARD_BACKWARD, MODES, Oracle, Problem, Provider
from benchmarks.race import DTYPES
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, LONG_SHAPES, Shape

BUILDERS = {**providers.BUILDERS, **dense_peers.BUILDERS}
_DEAD = (128, (128, 64, 32, 8))


@dataclass(frozen=True)
class Case:
    """One layer, dtype and adapter of ``max_rank`` components, with as many alive as ``live`` says, one by one.

    ``effort`` is the share of the usual time to spend on it; the lowest ``priority`` comes first.
    """

    shape: Shape
    dtype: torch.dtype
    max_rank: int
    live: tuple[int, ...]
    peers: tuple[str, ...]
    effort: float = 1.0
    modes: tuple[str, ...] = MODES
    priority: int = 1

    def __str__(self) -> str:
        return f"{self.shape} {DTYPES[self.dtype]} r{self.max_rank}"

    @property
    def id(self) -> str:
        """A name without spaces, for ``pytest -k``."""
        return str(self).replace(" ", "-") + ("-dead" if len(self.live) > 1 else "")

    def contenders(self) -> dict[str, tuple[str, int]]:
        """Name in the report -> (builder, live rank). Only this library can leave dead components out."""
        own = {f"lrlora {live}/{self.max_rank}": ("lrlora", live) for live in self.live}
        if len(own) == 1:
            own = {"lrlora": ("lrlora", self.live[0])}
        return {"base": ("base", 0), **own, **{peer: (peer, self.max_rank) for peer in self.peers}}

    @property
    def layer(self) -> str:
        return str(self.shape)

    def prepare(self, device: torch.device) -> tuple[Callable[[str, int], Provider], Callable[[Provider], None]]:
        """The providers of one random problem, and its oracle."""
        problem = Problem.random(self.shape, self.dtype, self.max_rank, device)
        return lambda builder, rank: BUILDERS[builder](problem, rank), Oracle(problem).check

    def work(self, provider: Provider, mode: str) -> Cost:
        """What has to be done: the base layer's work, or the work of the live components alone."""
        size, backward = self.dtype.itemsize, mode == FORWARD_BACKWARD
        if provider.rank == 0:
            return base_cost(self.shape, size, backward=backward)
        return lora_cost(self.shape, provider.rank, size, size, backward=backward)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """All cases for a device, the main ones first; or a tiny one that shows that the suite runs."""
    if quick:
        return [
            Case(
                Shape("tiny", "q_proj", 64, 96, 80),
                torch.float32,
                8,
                (8, 3),
                ("PEFT", "PEFT, accelerated", "eager"),
                effort=0.05,
            )
        ]
    if device.type == "cuda":
        peers: tuple[str, ...] = ("PEFT", "eager", "addmm")
        bf16, first = torch.bfloat16, LONG_SHAPES[0]
        others = [shape for shape in GPU_SHAPES if shape.model != "8B" and shape.projection in ("q_proj", "down_proj")]
        selected = [
            Case(shape, bf16, 16, (16,), (*peers, "PEFT, accelerated", "compile", "LoRAFusion"), priority=0)
            for shape in LONG_SHAPES
        ]
        selected += [Case(shape, bf16, 128, (128,), peers) for shape in LONG_SHAPES[:3]]
        sizes = [(shape, 16) for shape in others] + [(first, 4), (first, 64)]
        selected += [Case(shape, bf16, rank, (rank,), peers, priority=2) for shape, rank in sizes]
        return [*selected, Case(first, bf16, *_DEAD, ("PEFT",), priority=2)]
    peers = ("PEFT", "eager", "compile")
    sizes = [(shape, 16) for shape in CPU_SHAPES] + [(CPU_SHAPES[0], 4), (CPU_SHAPES[0], 64)]
    selected = [Case(shape, torch.float32, rank, (rank,), peers) for shape, rank in sizes]
    # Without matrix instructions for bf16 its base product takes several times longer.
    selected += [Case(replace(shape, M=shape.M // 4), torch.bfloat16, rank, (rank,), peers) for shape, rank in sizes]
    selected[0] = replace(selected[0], peers=(*peers, "PEFT, accelerated"))
    return [*selected, Case(CPU_SHAPES[0], torch.float32, *_DEAD, ("PEFT",))]
