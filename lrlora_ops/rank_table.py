"""Which expert owns which rank components, how many of them are live, and what they report back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor, nn


class RankTable(nn.Module):
    """Ownership of a pool of rank components by experts; a dense layer is one expert.

    A component is one row of ``lora_A`` and one row of ``lora_B``. Expert ``e`` uses the rows
    ``components[e, :ranks[e]]``, in that order, so a rank is a prefix of the expert's own components.

    Everything lives in device tensors that are written in place: a rank that changes moves no memory and
    recompiles nothing. ``ranks`` and ``components`` are buffers and travel in the state dict.

    Args:
        num_experts: E, the number of experts; 1 for a dense layer.
        max_rank: The most components that one expert may own.
        pool_size: R, the rows of ``lora_A`` and ``lora_B`` shared by all experts. If it is
            ``num_experts * max_rank``, every expert has its ``max_rank`` rows reserved for good.
        device: Where the tensors live.
        num_projections: P, the linear layers of an expert whose components are tied to one rank: 1, or 2 for an
            expert's gate_up_proj and down_proj.

    Attributes:
        components: int32 ``[E, max_rank]``; entries beyond the rank are unspecified.
        ranks: int32 ``[E]``, the rank of each expert: evaluation, merge and export follow it.
        train_ranks: int32 ``[E]``, the components that run in training mode: ``ranks``, unless a method
            samples them. Neither a parameter nor a buffer, like ``gate``.
        gate: fp32 ``[P * R]``, projection by projection, the factor of each component in training mode: one, or
            zero for a component that only reports its sensitivity. Its gradient *is* the sensitivity ``c = dL/dm``.
        demand: fp32 ``[2, E]`` of zeros, whose gradient is what was routed to each expert: the number of rows on which
            the loss depends, which padding is not, and the sum of their routing weights. Like ``gate``, a leaf in which
            autograd accumulates.

    Raises:
        ValueError: A size is negative or the pool is larger than it can ever be used.
    """

    components: Tensor
    ranks: Tensor
    train_ranks: Tensor
    gate: Tensor
    demand: Tensor

    def __init__(
        self,
        num_experts: int,
        max_rank: int,
        pool_size: int,
        device: torch.device | str | None = None,
        num_projections: int = 1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_experts", num_experts, 1),
            ("num_projections", num_projections, 1),
            ("max_rank", max_rank, 0),
            ("pool_size", pool_size, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if pool_size > num_experts * max_rank:
            raise ValueError(
                f"pool_size is {pool_size}, but {num_experts} experts of at most rank {max_rank} can use only "
                f"{num_experts * max_rank} rows; lower pool_size or raise max_rank"
            )
        self.num_experts, self.max_rank, self.pool_size = num_experts, max_rank, pool_size
        self.num_projections = num_projections
        self.reserved = pool_size == num_experts * max_rank
        components = torch.zeros(num_experts, max_rank, dtype=torch.int32, device=device)
        if self.reserved:
            components = torch.arange(pool_size, dtype=torch.int32, device=device).view(num_experts, max_rank)
        self.register_buffer("components", components)
        self.register_buffer("ranks", torch.zeros(num_experts, dtype=torch.int32, device=device))
        self.train_ranks = torch.zeros(num_experts, dtype=torch.int32, device=device)
        self.gate = torch.ones(num_projections * pool_size, device=device).requires_grad_()
        self.demand = torch.zeros(2, num_experts, device=device).requires_grad_()
        self.register_load_state_dict_post_hook(_reset_after_load)

    @classmethod
    def uniform(
        cls,
        num_experts: int,
        rank: int,
        max_rank: int | None = None,
        pool_size: int | None = None,
        device: torch.device | str | None = None,
        num_projections: int = 1,
    ) -> RankTable:
        """A table in which every expert has ``rank`` components.

        Args:
            num_experts: E.
            rank: Of every expert.
            max_rank: The most that one expert may own; default ``rank``.
            pool_size: R; default ``num_experts * max_rank``.
            device: Where the tensors live.
            num_projections: P.

        Raises:
            ValueError: A size is out of range, or the pool holds less than ``num_experts * rank`` components.
        """
        max_rank = rank if max_rank is None else max_rank
        pool_size = num_experts * max_rank if pool_size is None else pool_size
        table = cls(num_experts, max_rank, pool_size, device, num_projections)
        table.update(table.checked([rank] * num_experts))
        return table

    def set_ranks(self, ranks: Sequence[int] | Tensor) -> Tensor:
        """Give every expert a new rank; experts keep the rows they have and grow by free ones.

        Reads the table on the host; ``update`` does not.

        Args:
            ranks: E integers from 0 to ``max_rank``, with a sum within the pool.

        Returns:
            int64 tensor on the table's device: the pool rows that became live. A caller that wants the
            output unchanged zeroes these rows of ``lora_B``.

        Raises:
            ValueError: A rank is negative or above ``max_rank``, there are not E of them, or the pool is too
                small. The table is unchanged then.
            TypeError: A rank is not an integer.
        """
        return self.update(self.checked(ranks)).nonzero().flatten()

    @torch.no_grad()
    def update(self, ranks: Tensor) -> Tensor:
        """``set_ranks`` by operations on the device alone: nothing is checked, nothing waits.

        Args:
            ranks: integer ``[E]`` on the table's device, each within ``0..max_rank``, with a sum within the pool.

        Returns:
            bool ``[R]``: the pool rows that became live.
        """
        slots = torch.arange(self.max_rank, device=ranks.device)
        wanted = slots < ranks[:, None]
        kept = wanted & (slots < self.ranks[:, None])
        grown = wanted & ~kept
        if not self.reserved and self.pool_size:
            # Free rows in order go to the new slots in order; a stable sort puts the owned ones last.
            free = self._rows(kept).to(torch.uint8).argsort(stable=True).to(torch.int32)
            position = (grown.flatten().cumsum(0) - 1).clamp(min=0).view_as(grown)
            self.components.copy_(torch.where(grown, free[position], self.components))
        self.ranks.copy_(ranks)
        self.reset_training_state()
        return self._rows(grown)

    def _rows(self, slots: Tensor) -> Tensor:
        """bool ``[R]``: the pool rows in the slots, bool ``[E, max_rank]``, that are set."""
        rows = torch.zeros(self.pool_size + 1, dtype=torch.bool, device=slots.device)
        owned = torch.where(slots, self.components, self.pool_size).flatten().long()
        return rows.index_fill_(0, owned, True)[:-1]

    def live_rows(self) -> Tensor:
        """bool ``[R]``: the pool rows of live components."""
        return self._rows(torch.arange(self.max_rank, device=self.ranks.device) < self.ranks[:, None])

    def rows_of(self, expert: int) -> Tensor:
        """int64 ``[rank]``: the pool rows of an expert's live components. Reads its rank on the host."""
        return self.components[expert, : int(self.ranks[expert])].long()

    def checked(self, ranks: Sequence[int] | Tensor) -> Tensor:
        """int32 ``[E]`` on the table's device: these ranks, if it can have them. Raises as ``set_ranks`` does."""
        wanted = [index(rank) for rank in ranks]
        if len(wanted) != self.num_experts:
            raise ValueError(f"ranks has {len(wanted)} entries; it must have one per expert, {self.num_experts}")
        for expert, rank in enumerate(wanted):
            if not 0 <= rank <= self.max_rank:
                raise ValueError(
                    f"rank {rank} of expert {expert} is outside 0..{self.max_rank}; "
                    "raise max_rank when the adapter is made, or ask for less"
                )
        if sum(wanted) > self.pool_size:
            raise ValueError(
                f"the ranks sum to {sum(wanted)}, but the pool holds {self.pool_size} components; "
                "raise the pool size when the adapter is made, or ask for less"
            )
        return torch.tensor(wanted, dtype=torch.int32, device=self.ranks.device)

    def resize(self, max_rank: int) -> None:
        """Let every expert of a reserved table own ``max_rank`` rows; ranks stay, statistics are dropped.

        Args:
            max_rank: At least the largest rank.

        Raises:
            ValueError: The table shares a pool, or ``max_rank`` is below a rank; nothing is changed then.
        """
        if not self.reserved:
            raise ValueError("a table that shares a pool of components cannot be resized; make a new one")
        new = self._of_capacity(max_rank, self.num_experts * max_rank)
        new.set_ranks(self.ranks)
        self._become(new)

    def compact(self) -> Tensor:
        """Own the live components alone, expert by expert; statistics are dropped. Reads the ranks on the host.

        Returns:
            The old pool rows in the order of the new ones, int64.
        """
        ranks = self.ranks.tolist()
        rows = torch.cat([own[:rank] for own, rank in zip(self.components, ranks, strict=True)]).long()
        new = self._of_capacity(max(ranks), sum(ranks))
        new.set_ranks(ranks)
        self._become(new)
        return rows

    def reallocate(self, max_rank: int, pool_size: int) -> None:
        """Another capacity, every rank 0; statistics are dropped.

        Raises:
            ValueError: A size is negative, or the pool is larger than it can ever be used.
        """
        self._become(self._of_capacity(max_rank, pool_size))

    def _of_capacity(self, max_rank: int, pool_size: int) -> RankTable:
        return RankTable(self.num_experts, max_rank, pool_size, self.ranks.device, self.num_projections)

    def _become(self, new: RankTable) -> None:
        self.max_rank, self.pool_size, self.reserved = new.max_rank, new.pool_size, new.reserved
        self.components, self.ranks, self.train_ranks = new.components, new.ranks, new.train_ranks
        self.gate, self.demand = (
            fresh.detach().to(old.dtype).requires_grad_()
            for fresh, old in ((new.gate, self.gate), (new.demand, self.demand))
        )

    @property
    def sensitivity(self) -> Tensor:
        """fp32 ``[P * R]``: ``dL/dm`` of each component, summed over the backward passes since the last clear."""
        return torch.zeros_like(self.gate) if self.gate.grad is None else self.gate.grad

    @property
    def row_counts(self) -> Tensor:
        """fp32 ``[E]``: rows with a gradient that each expert had in the backward passes since the last clear."""
        return self.routed[0]

    @property
    def routed(self) -> Tensor:
        """fp32 ``[2, E]``: the row counts, and the sums of the rows' routing weights; see ``demand``."""
        return torch.zeros_like(self.demand) if self.demand.grad is None else self.demand.grad

    def clear_statistics(self) -> None:
        """Forget what was accumulated, in place so that captured graphs stay valid."""
        for leaf in (self.gate, self.demand):
            if leaf.grad is not None:
                leaf.grad.zero_()

    def reset_training_state(self) -> None:
        """Training runs exactly the components that evaluation runs."""
        device = self.ranks.device
        if self.train_ranks.device != device:  # a state dict was assigned to a table on the meta device
            self.train_ranks = torch.empty_like(self.ranks)
            self.gate = torch.empty_like(self.gate, device=device).requires_grad_()
            self.demand = torch.zeros_like(self.demand, device=device).requires_grad_()
        self.train_ranks.copy_(self.ranks)
        with torch.no_grad():
            self.gate.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankTable:
        """Move the plain tensors along with the buffers; a change to half precision does not touch the leaves."""
        super()._apply(fn, recurse)
        was_meta = self.gate.is_meta
        moved = fn(self.gate.detach())
        dtype = torch.float64 if moved.dtype == torch.float64 else torch.float32
        self.train_ranks = self.ranks.clone() if was_meta else self.train_ranks.to(moved.device)
        for name, value in (("gate", 1.0), ("demand", 0.0)):
            leaf = getattr(self, name).detach()
            leaf = torch.full_like(leaf, value, device=moved.device) if was_meta else leaf
            setattr(self, name, leaf.to(moved.device, dtype, copy=True).requires_grad_())
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, max_rank={self.max_rank}, pool_size={self.pool_size}"


def _reset_after_load(table: RankTable, _: object) -> None:
    table.reset_training_state()
