"""What there is to do on a CPU: the experts that have rows and components, and the pool rows of these components.

BLAS may order a sum differently for another matrix shape. Components are therefore worked on in the fixed
segments 0..16, 16..32, 32..64, 64..128 and so on: a component that is born leaves the shapes that the others
see unchanged, and with a zero row of ``b`` it leaves the output bit-identical.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SEGMENT = 16


@cache
def segments_of(rank: int, max_rank: int) -> list[slice]:
    """Ranges of slots that cover ``rank`` components; their bounds do not depend on the rank."""
    segments, low, high = [], 0, min(SEGMENT, max_rank)
    while low < rank:
        segments.append(slice(low, high))
        low, high = high, min(2 * high, max_rank)
    return segments


@dataclass(frozen=True)
class Expert:
    """An expert that has rows and components.

    ``live`` is where its components are among those of all such experts, ``padded`` the same with each expert's
    last segment filled up.
    """

    index: int
    rows: slice
    rank: int
    live: slice
    padded: slice

    def segments(self, max_rank: int, padded_rows: Tensor) -> list[tuple[slice, Tensor]]:
        """(rank slots, their pool rows) by segment."""
        first = self.padded.start
        return [(s, padded_rows[first + s.start : first + s.stop]) for s in segments_of(self.rank, max_rank)]


def live_experts(ranks: Tensor, max_rank: int, group_offsets: Tensor | None, num_rows: int) -> list[Expert]:
    """The experts that have work to do."""
    offsets = [0, num_rows] if group_offsets is None else group_offsets.tolist()
    experts: list[Expert] = []
    live = padded = 0
    for index, rank in enumerate(ranks.tolist()):
        if not 0 <= rank <= max_rank:
            raise ValueError(f"the rank of expert {index} is {rank}; it must be from 0 to {max_rank}, the capacity")
        if rank and offsets[index + 1] > offsets[index]:
            rows, width = slice(offsets[index], offsets[index + 1]), segments_of(rank, max_rank)[-1].stop
            experts.append(Expert(index, rows, rank, slice(live, live + rank), slice(padded, padded + width)))
            live, padded = live + rank, padded + width
    return experts


def pool_index(components: Tensor | None, experts: list[Expert]) -> slice | Tensor:
    """Pool rows of the live components, expert by expert; a dense layer owns its pool in order."""
    if components is None:
        return slice(0, sum(expert.rank for expert in experts))
    owned = components[torch.tensor([expert.index for expert in experts], dtype=torch.long)]
    ranks = torch.tensor([expert.rank for expert in experts])
    return owned[torch.arange(components.shape[1]) < ranks[:, None]].long()


def padded_rows(pool: Tensor, index: slice | Tensor, experts: list[Expert], compute: torch.dtype) -> Tensor:
    """The pool rows of the live components, each expert's filled up with zero rows to whole segments.

    The rows of dead components are never read.
    """
    rows = (pool[index] if isinstance(index, slice) else pool.index_select(0, index)).to(compute)
    size = experts[-1].padded.stop if experts else 0
    if size == rows.shape[0]:
        return rows
    padded = rows.new_zeros(size, *rows.shape[1:])
    for expert in experts:
        padded[expert.padded.start : expert.padded.start + expert.rank] = rows[expert.live]
    return padded
