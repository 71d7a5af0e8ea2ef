"""VariableRankLoRAGroupedLinear: a frozen linear layer per expert with a LoRA of its own rank per expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrlora_ops.modules._adapter import ComponentPool, RankAdapter, set_ranks
from lrlora_ops.ops.grouped_lora_linear import grouped_lora_linear
from lrlora_ops.rank_table import RankTable


class VariableRankLoRAGroupedLinear(RankAdapter, ComponentPool):
    """``y[i] = W[e] x[i] + bias[e] + scaling * sum over components j of expert e: <x[i], a_j> b_j``, e = e_i.

    For Mixture-of-Experts layers that people write themselves; W and bias are frozen. The projections of an expert
    share its rank if their modules share a table:

        table = RankTable.uniform(num_experts, rank=8, max_rank=32, pool_size=16 * num_experts, num_projections=2)
        up = VariableRankLoRAGroupedLinear(num_experts, hidden, 2 * intermediate, table=table, projection=0)
        down = VariableRankLoRAGroupedLinear(num_experts, intermediate, hidden, table=table, projection=1)

    Args:
        num_experts: E, the experts.
        in_features: K.
        out_features: N.
        bias: Whether the experts have biases.
        max_rank: The most components that one expert may own.
        rank: Of every expert at the start.
        pool_rank: Components held per expert on the average; the pool has ``num_experts * pool_rank`` of them. Default
            ``max_rank``: each expert has its own ``max_rank`` rows.
        lora_alpha: Default ``2 * max_rank``, so that scaling is 2.
        table: A table to share, instead of ``max_rank``, ``rank`` and ``pool_rank``.
        projection: Which of the table's projections this is.
        device: Where the tensors are made.
        dtype: Of all parameters.

    Attributes:
        weight: Frozen parameter ``[E, N, K]``.
        bias: Frozen parameter ``[E, N]``, or None.
        lora_A: Parameter ``[R, K]``, the pool of all experts.
        lora_B: Parameter ``[R, N]``, likewise; it starts at zero.
        scaling: ``lora_alpha / max_rank``; it stays what it was when ranks change.
        table: The ``RankTable`` that says which expert owns which rows of the pool.

    Raises:
        ValueError: A size or a rank is out of range.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        max_rank: int = 32,
        rank: int = 8,
        pool_rank: int | None = None,
        lora_alpha: float | None = None,
        table: RankTable | None = None,
        projection: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if table is None:
            pool_size = None if pool_rank is None else num_experts * pool_rank
            table = RankTable.uniform(num_experts, rank, max_rank, pool_size, device)
        if table.num_experts != num_experts or not 0 <= projection < table.num_projections:
            raise ValueError(
                f"the table has {table.num_experts} experts and {table.num_projections} projections, but this is "
                f"projection {projection} of {num_experts} experts; make it with RankTable.uniform(..., "
                "num_projections=...)"
            )
        self.projection = projection
        self._add_table(table, lora_alpha)
        bound = 1 / math.sqrt(max(in_features, 1))
        weight = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter(
            "bias",
            nn.Parameter(weight.new_empty(num_experts, out_features).uniform_(-bound, bound), False) if bias else None,
        )
        self._add_components(table.pool_size, in_features, out_features, device, dtype)

    def pools(self) -> dict[str, ComponentPool]:
        return {"": self}

    @property
    def ranks(self) -> Tensor:
        """int32 ``[E]`` on the device: the rank of each expert."""
        return self.table.ranks

    def set_ranks(self, ranks: Sequence[int] | Tensor) -> None:
        """Give every expert a new rank. Components that become live start with ``b = 0``: growing leaves the output
        bit-identical.

        Args:
            ranks: E integers from 0 to ``max_rank``, with a sum within the pool.

        Raises:
            ValueError: A rank is out of range, the pool too small, or the table shared; nothing is changed then.
        """
        if self.table.num_projections > 1:
            raise ValueError(
                "the table is shared with other projections, whose new components have to start at zero too: "
                "rows = table.set_ranks(ranks), then module.lora_B.data[rows] = 0 for each module"
            )
        set_ranks([self], self.table, ranks)

    def forward(self, x: Tensor, group_offsets: Tensor) -> Tensor:
        """``[L, K] -> [L, N]``. In training mode a method's sampled ranks and probes apply.

        Args:
            x: ``[L, K]``, rows sorted by expert.
            group_offsets: int32 ``[E + 1]``, where each expert's rows begin and the last one's end, as in ``Routing``.

        Returns:
            In x's dtype; zero for rows past the last offset, which are no expert's.

        Raises:
            ValueError: As ``grouped_lora_linear``.
        """
        ranks, gates = self.running()
        return grouped_lora_linear(
            x,
            self.lora_A,
            self.lora_B,
            group_offsets,
            self.table,
            gate=gates[self.projection],
            scaling=self.scaling,
            weight=self.weight,
            bias=self.bias,
            ranks=ranks,
            demand=self.table.demand if self.training and self.projection == 0 else None,
        )

    def delta_weight(self, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[N, K]``: the update of one expert's weight, computed in ``dtype``; default fp32, or wider."""
        return self.delta(self.table.rows_of(expert), self.scaling, dtype)

    @torch.no_grad()
    def merge(self) -> VariableRankLoRAGroupedLinear:
        """The same layer with the updates in its weight, and no components."""
        merged = VariableRankLoRAGroupedLinear(
            self.table.num_experts,
            self.in_features,
            self.out_features,
            self.bias is not None,
            max_rank=0,
            rank=0,
            device="meta",
        )
        weight = self.weight.clone()
        self.add_update("", weight)
        merged.to_empty(device=weight.device)
        merged.weight, merged.bias = nn.Parameter(weight, False), self.bias
        merged.table.reallocate(0, 0)
        return merged.train(self.training)

    def merge_into(self, host: nn.Module) -> nn.Module:
        return self.merge()

    def plain(self, host: nn.Module) -> nn.Module:
        raise ValueError("a VariableRankLoRAGroupedLinear is no other layer's adapter; merge it")

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.table.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"max_rank={self.max_rank}, pool_size={self.table.pool_size}"
        )
