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

    Attributes:
        components: int32 ``[E, max_rank]``; entries beyond the rank are unspecified.
        ranks: int32 ``[E]``, the rank of each expert: evaluation, merge and export follow it.
        train_ranks: int32 ``[E]``, the components that run in training mode: ``ranks``, unless a method
            samples them. Neither a parameter nor a buffer, like ``gate``.
        gate: fp32 ``[R]``, the factor of each component in training mode: one, or zero for a component that
            only reports its sensitivity. Its gradient *is* the sensitivity ``c = dL/dm``.

    Raises:
        ValueError: A size is negative or the pool is larger than it can ever be used.
    """

    components: Tensor
    ranks: Tensor

    def __init__(
        self, num_experts: int, max_rank: int, pool_size: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_experts", num_experts, 1),
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
        self.reserved = pool_size == num_experts * max_rank
        components = torch.zeros(num_experts, max_rank, dtype=torch.int32, device=device)
        if self.reserved:
            components = torch.arange(pool_size, dtype=torch.int32, device=device).view(num_experts, max_rank)
        self.register_buffer("components", components)
        self.register_buffer("ranks", torch.zeros(num_experts, dtype=torch.int32, device=device))
        self.train_ranks = torch.zeros(num_experts, dtype=torch.int32, device=device)
        self.gate = torch.ones(pool_size, device=device).requires_grad_()
        self.register_load_state_dict_post_hook(_reset_after_load)

    @classmethod
    def uniform(
        cls,
        num_experts: int,
        rank: int,
        max_rank: int | None = None,
        pool_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> RankTable:
        """A table in which every expert has ``rank`` components.

        ``max_rank`` defaults to ``rank``, ``pool_size`` to ``num_experts * max_rank``.
        """
        max_rank = rank if max_rank is None else max_rank
        table = cls(num_experts, max_rank, num_experts * max_rank if pool_size is None else pool_size, device)
        table.set_ranks([rank] * num_experts)
        return table

    def set_ranks(self, ranks: Sequence[int] | Tensor) -> Tensor:
        """Give every expert a new rank; experts keep the rows they have and grow by free ones.

        Args:
            ranks: E integers.

        Returns:
            int64 tensor on the table's device: the pool rows that became live. A caller that wants the
            output unchanged zeroes these rows of ``lora_B``.

        Raises:
            ValueError: A rank is negative or above ``max_rank``, there are not E of them, or the pool is too
                small. The table is unchanged then.
            TypeError: A rank is not an integer.

        Reads the table on the host. A method that changes ranks at every step writes ``ranks`` and
        ``train_ranks`` of a reserved table in place instead.
        """
        wanted = [index(rank) for rank in ranks]
        self._check(wanted)
        owned, current = self.components.tolist(), self.ranks.tolist()
        new_rows: list[int] = []
        if self.reserved:
            for rows, old, new in zip(owned, current, wanted, strict=True):
                new_rows += rows[old:new]
        else:
            kept = {row for rows, old, new in zip(owned, current, wanted, strict=True) for row in rows[: min(old, new)]}
            free = iter([row for row in range(self.pool_size) if row not in kept])
            for rows, old, new in zip(owned, current, wanted, strict=True):
                rows[old:new] = [next(free) for _ in range(old, new)]
                new_rows += rows[old:new]
        device = self.components.device
        self.components.copy_(torch.tensor(owned, dtype=torch.int32, device=device).view_as(self.components))
        self.ranks.copy_(torch.tensor(wanted, dtype=torch.int32, device=device))
        self.reset_training_state()
        return torch.tensor(new_rows, dtype=torch.int64, device=device)

    def _check(self, ranks: list[int]) -> None:
        if len(ranks) != self.num_experts:
            raise ValueError(f"ranks has {len(ranks)} entries; it must have one per expert, {self.num_experts}")
        for expert, rank in enumerate(ranks):
            if not 0 <= rank <= self.max_rank:
                raise ValueError(
                    f"rank {rank} of expert {expert} is outside 0..{self.max_rank}; "
                    "raise max_rank when the adapter is made, or ask for less"
                )
        if sum(ranks) > self.pool_size:
            raise ValueError(
                f"the ranks sum to {sum(ranks)}, but the pool holds {self.pool_size} components; "
                "raise the pool size when the adapter is made, or ask for less"
            )

    def resize(self, max_rank: int) -> None:
        """Let every expert of a reserved table own ``max_rank`` rows; ranks stay, statistics are dropped.

        Raises:
            ValueError: The table shares a pool, or ``max_rank`` is below a rank; nothing is changed then.
        """
        if not self.reserved:
            raise ValueError("a table that shares a pool of components cannot be resized; make a new one")
        new = RankTable(self.num_experts, max_rank, self.num_experts * max_rank, self.ranks.device)
        new.set_ranks(self.ranks)
        self.max_rank, self.pool_size = new.max_rank, new.pool_size
        self.components, self.ranks = new.components, new.ranks
        self.train_ranks, self.gate = new.train_ranks, new.gate.detach().to(self.gate.dtype).requires_grad_()

    @property
    def sensitivity(self) -> Tensor:
        """fp32 ``[R]``: ``dL/dm`` of each component, summed over the backward passes since the last clear."""
        return torch.zeros_like(self.gate) if self.gate.grad is None else self.gate.grad

    def clear_statistics(self) -> None:
        """Forget the accumulated sensitivity, in place so that captured graphs stay valid."""
        if self.gate.grad is not None:
            self.gate.grad.zero_()

    def reset_training_state(self) -> None:
        """Training runs exactly the components that evaluation runs."""
        if self.train_ranks.device != self.ranks.device:  # a state dict was assigned to a table on the meta device
            self.train_ranks = torch.empty_like(self.ranks)
            self.gate = torch.empty_like(self.gate, device=self.ranks.device).requires_grad_()
        self.train_ranks.copy_(self.ranks)
        with torch.no_grad():
            self.gate.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankTable:
        """Move the plain tensors along with the buffers; a change to half precision does not touch the gate."""
        super()._apply(fn, recurse)
        moved = fn(self.gate.detach())
        dtype = torch.float64 if moved.dtype == torch.float64 else torch.float32
        gate = torch.ones_like(moved) if self.gate.is_meta else self.gate.detach()
        self.train_ranks = self.ranks.clone() if self.gate.is_meta else self.train_ranks.to(moved.device)
        self.gate = gate.to(moved.device, dtype, copy=True).requires_grad_()
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, max_rank={self.max_rank}, pool_size={self.pool_size}"


def _reset_after_load(table: RankTable, _: object) -> None:
    table.reset_training_state()
