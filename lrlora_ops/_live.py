"""What there is to do on a CPU: the experts that have rows, and the pool rows of their live components.

BLAS may order a sum differently for another matrix shape. Components are therefore worked on in the fixed
segments 0..16, 16..32, 32..64, 64..128 and so on: a component that is born leaves the shapes that the others
see unchanged, and with a zero row of ``b`` it leaves the output bit-identical. The slots from the rank to the end
of its segment are dead: they stand for the expert's first component, and whoever multiplies has zeros for them.

Tensors are cut into the parts of all experts at once: for an expert with few rows a call takes as long as a product.
Pool rows that follow each other are not gathered either.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT = 16
# A block of rows takes 2 MB in fp32 for each thread, about a core's share of the caches.
BLOCK_ELEMENTS = 2**19


def row_blocks(num_rows: int, num_cols: int) -> Iterator[slice]:
    """Rows that are worked on at a time: what is made of them stays in the caches, and its memory is used again."""
    size = max(1, BLOCK_ELEMENTS // max(num_cols, 1)) * torch.get_num_threads()
    return (slice(first, first + size) for first in range(0, num_rows, size))


@cache
def segments_of(rank: int, max_rank: int) -> list[slice]:
    """Ranges of slots that cover ``rank`` components; their bounds do not depend on the rank."""
    segments, low, high = [], 0, min(SEGMENT, max_rank)
    while low < rank:
        segments.append(slice(low, high))
        low, high = high, min(2 * high, max_rank)
    return segments


def runs(index: Tensor, sizes: list[int]) -> list[int | None]:
    """Of each part of ``index``, of these sizes above 0: its first number if it counts up from there, else None."""
    if not sizes:
        return []
    numbers, ends = index.numpy(), np.cumsum(sizes)
    firsts = ends - sizes
    breaks = np.cumsum(np.diff(numbers, prepend=numbers[0]) != 1)
    is_run = breaks[ends - 1] == breaks[firsts]
    return [int(first) if whole else None for first, whole in zip(numbers[firsts], is_run, strict=True)]


@dataclass(frozen=True)
class Expert:
    """An expert that has rows.

    ``pieces`` are its segments among those of all experts.
    """

    index: int
    rank: int
    pieces: range


@dataclass(frozen=True)
class Work:
    """The experts that have rows; those that have components, too, are ``ranked``.

    For each slot of their segments, ``[S]``: its ``owner``, its ``position`` and the live ``slot`` it stands for;
    ``live`` says which of them stand for themselves.
    """

    counts: list[int]
    max_rank: int
    experts: list[Expert]
    widths: list[int]
    owner: Tensor
    position: Tensor
    slot: Tensor
    live: Tensor
    row_expert: Tensor

    @property
    def num_rows(self) -> int:
        """Rows that have an expert."""
        return self.row_expert.shape[0]

    @property
    def ranked(self) -> list[Expert]:
        return [expert for expert in self.experts if expert.rank]

    @property
    def all_live(self) -> bool:
        """Whether no segment has a dead slot."""
        return self.live.shape == self.slot.shape

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, for x ``[L, ...]``."""
        return torch.split_with_sizes(x[: self.num_rows], self.counts)

    def columns(self, u: Tensor) -> list[list[Tensor]]:
        """By expert, ``[rows, slots]`` for each of its segments, for u ``[L, max_rank]``."""
        by_segment = [self.rows(u[:, slots]) for slots in segments_of(self.max_rank, self.max_rank)]
        pieces: list[list[Tensor]] = [[] for _ in self.counts]
        for expert in self.experts:
            pieces[expert.index] = [by_segment[s][expert.index] for s in range(len(expert.pieces))]
        return pieces

    def pool_index(self, components: Tensor | None) -> Tensor:
        """int64 ``[S]``: the pool row of each slot; a dense layer owns its pool in order."""
        return self.slot if components is None else components[self.owner, self.slot].long()

    def lie_together(self, components: Tensor | None) -> bool:
        """Whether the slots are the pool's first rows, in order."""
        return components is None and self.all_live

    def of_slots(self, pool: Tensor, components: Tensor | None) -> Tensor:
        """``[S, ...]``: the pool row of each slot, a view of the pool if they lie together."""
        if self.lie_together(components):
            return pool[: self.slot.shape[0]]
        return pool.index_select(0, self.pool_index(components))

    def live_index(self, components: Tensor | None) -> Tensor:
        """int64 ``[sum of ranks]``: the pool rows of the live components, by expert."""
        index = self.pool_index(components)
        return index if self.all_live else index[self.live]

    def by_row(self, factors: Tensor) -> Tensor:
        """``[L, max_rank]`` (``[max_rank]`` for one expert): the ``factors`` ``[S]`` of each row's slots, else 0."""
        if len(self.counts) == 1:
            return F.pad(factors, (0, self.max_rank - factors.shape[0]))
        of_expert = factors.new_zeros(len(self.counts), self.max_rank)
        of_expert[self.owner, self.position] = factors
        return of_expert[self.row_expert]


def find_work(ranks: Tensor, max_rank: int, group_offsets: Tensor | None, num_rows: int) -> Work:
    """What these ranks and groups ask for. Reads them, which is free on a CPU."""
    offsets = [0, num_rows] if group_offsets is None else group_offsets.tolist()
    return _work(tuple(ranks.tolist()), max_rank, tuple(offsets))


@lru_cache(maxsize=8)  # the calls of one layer's step share it
def _work(ranks: tuple[int, ...], max_rank: int, offsets: tuple[int, ...]) -> Work:
    counts = [end - first for first, end in pairwise(offsets)]
    experts: list[Expert] = []
    widths: list[int] = []
    owner: list[int] = []
    position: list[int] = []
    for index, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
        if not 0 <= rank <= max_rank:
            raise ValueError(f"the rank of expert {index} is {rank}; it must be from 0 to {max_rank}, the capacity")
        if count:
            own = [segment.stop - segment.start for segment in segments_of(rank, max_rank)]
            experts.append(Expert(index, rank, range(len(widths), len(widths) + len(own))))
            widths += own
            owner += [index] * sum(own)
            position += range(sum(own))
    owners, positions = torch.tensor(owner, dtype=torch.long), torch.tensor(position, dtype=torch.long)
    is_live = positions < torch.tensor(ranks)[owners]
    row_expert = torch.arange(len(ranks)).repeat_interleave(torch.tensor(counts))
    slots, live = positions.where(is_live, 0), is_live.nonzero().flatten()
    return Work(counts, max_rank, experts, widths, owners, positions, slots, live, row_expert)
