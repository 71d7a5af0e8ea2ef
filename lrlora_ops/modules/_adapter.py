"""What all adapters are: pools of rank components, one for each projection, and one table that says who owns them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrlora_ops._sharding import require_whole, whole, zero_rows
from lrlora_ops.ops._autocast import without_autocast
from lrlora_ops.rank_table import RankTable


class ComponentPool(nn.Module):
    """``lora_A`` ``[R, K]`` and ``lora_B`` ``[R, N]`` of one projection.

    A starts uniform in ``+-1/sqrt(K)`` (PEFT's), B at zero, so that a new adapter changes no output.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        pool_size: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._add_components(pool_size, in_features, out_features, device, dtype)

    def _add_components(
        self,
        pool_size: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.lora_A = nn.Parameter(_initial_a(torch.empty(0, in_features, device=device, dtype=dtype), pool_size))
        self.lora_B = nn.Parameter(torch.zeros(pool_size, out_features, device=device, dtype=dtype))

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """What of the pool the optimizer trains, by name."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.no_grad()
    def delta(self, rows: Tensor, scaling: float, dtype: torch.dtype | None) -> Tensor:
        """``[N, K]``: ``scaling * sum over the pool rows of outer(b_j, a_j)``; default in fp32, or wider."""
        dtype = dtype or torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = (whole(parameter)[rows].to(dtype) for parameter in (self.lora_A, self.lora_B))
        with without_autocast(rows.device):
            return scaling * (b.t() @ a)

    @torch.no_grad()
    def hold(self, rows: Tensor, size: int) -> None:
        """Hold these rows, then new ones up to ``size``, in parameters that keep their identity and lose their grad.

        Raises:
            ValueError: The parameters are divided among processes.
        """
        require_whole((self.lora_A, self.lora_B), "another capacity")
        for parameter, fresh in (
            (self.lora_A, _initial_a(self.lora_A, size)),
            (self.lora_B, self.lora_B.new_zeros(size, self.out_features)),
        ):
            fresh[: len(rows)] = parameter[rows]
            parameter.grad = None
            # The gradient accumulator that a live graph holds knows the old shape; a change of dtype discards it.
            parameter.data = fresh.new_empty(0, dtype=torch.float32 if fresh.dtype == torch.float16 else torch.float16)
            parameter.data = fresh


class RankAdapter(nn.Module):
    """Pools, a table over them, and a scaling that does not depend on the ranks.

    Attributes:
        table: The ``RankTable`` that rank methods drive; it travels in the state dict.
        scaling: ``lora_alpha / max_rank`` of the time when the adapter was made.
        dropout: Probability of dropping an element of the adapter's input, in training.
        reports_sensitivity: Whether its backward yields c, which methods that change ranks need.
    """

    table: RankTable
    scaling: float
    dropout: float = 0.0
    reports_sensitivity = True

    def pools(self) -> dict[str, ComponentPool]:
        """The projections' pools by the names under which they are submodules; "" is the adapter itself."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by its name within the adapter."""
        trained: dict[str, nn.Parameter] = {}
        for projection, pool in self.pools().items():
            prefix = f"{projection}." if projection else ""
            trained |= {f"{prefix}{name}": parameter for name, parameter in pool.own_tensors().items()}
        return trained

    def shown_rank(self) -> Tensor:
        """What ``Adapters.ranks`` shows: int32 ``[E]``, or ``[]`` of a dense layer; fp32 for a stable rank."""
        return self.table.ranks

    def _add_table(self, table: RankTable, lora_alpha: float | None) -> None:
        self.table = table
        self.lora_alpha = 2.0 * table.max_rank if lora_alpha is None else lora_alpha
        self.scaling = self.lora_alpha / table.max_rank if table.max_rank else 0.0

    @property
    def max_rank(self) -> int:
        """The most components that an expert, or the dense layer, may have."""
        return self.table.max_rank

    @property
    def sensitivity(self) -> Tensor:
        """fp32 ``[R]``, or ``[P * R]`` for P projections: ``dL/dm`` of each component's gate m, summed over the
        training backward passes since the last clear: ``scaling * sum_t <x_t, a_j> <dL/dy_t, b_j>`` over rows t."""
        return self.table.sensitivity

    def running(self) -> tuple[Tensor, list[Tensor | None]]:
        """The ranks that run in the current mode, int32 ``[E]``, and the gate of each projection or None."""
        table = self.table
        self._follow_device()
        if not self.training:
            return table.ranks, [None] * table.num_projections
        return table.train_ranks, list(table.gate.chunk(table.num_projections))

    def _follow_device(self) -> None:
        """from_pretrained moves parameters and buffers alone."""
        if self.table.gate.device != self.table.ranks.device:
            self.table.reset_training_state()

    def install(self, model: nn.Module, host: nn.Module) -> None:
        """Make the adapter part of the model: in the place of ``host``, the layer that it was made for."""
        replace_module(model, host, self)

    def merge_into(self, host: nn.Module) -> nn.Module:
        """What shall replace ``host``, the module that goes by the adapter's name, when the update is merged.

        Raises:
            ValueError, RuntimeError: It cannot be merged.
        """
        raise NotImplementedError

    def plain(self, host: nn.Module) -> nn.Module:
        """What ``host``, the module that goes by the adapter's name, was before: the same weights, no adapter.

        Raises:
            ValueError: It was nothing.
        """
        raise NotImplementedError

    @torch.no_grad()
    def add_update(self, projection: str, weight: Tensor, transposed: bool = False) -> None:
        """Add the update of a projection to its weight in place, expert by expert; each sum is rounded once.

        Args:
            projection: A key of ``pools``.
            weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; ``[N, K]`` of a dense layer.
            transposed: The layout of ``weight``.
        """
        pool = self.pools()[projection]
        dtype = torch.promote_types(torch.promote_types(weight.dtype, pool.lora_A.dtype), torch.float32)
        for expert, target in enumerate(weight[None] if weight.dim() == 2 else weight):
            delta = pool.delta(self.table.rows_of(expert), self.scaling, dtype)
            target.copy_(target.to(dtype) + (delta.t() if transposed else delta))

    @torch.no_grad()
    def reallocate(self, max_rank: int, pool_size: int) -> None:
        """Another capacity, with new components and no rank: for a state that is loaded next."""
        self.table.reallocate(max_rank, pool_size)
        nothing = torch.empty(0, dtype=torch.long, device=self.table.ranks.device)
        for pool in self.pools().values():
            pool.hold(nothing, pool_size)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on, as JSON gives it back."""
        return {
            "num_experts": self.table.num_experts,
            "max_rank": self.table.max_rank,
            "pool_size": self.table.pool_size,
            "scaling": self.scaling,
            "dropout": self.dropout,
            "features": {name: [pool.in_features, pool.out_features] for name, pool in self.pools().items()},
        }


def unique_tables(adapters: Mapping[str, RankAdapter]) -> dict[str, RankTable]:
    """Each table once, by the name of the first adapter that uses it."""
    names: dict[int, str] = {}
    for name, adapter in adapters.items():
        names.setdefault(id(adapter.table), name)
    return {name: adapters[name].table for name in names.values()}


@torch.no_grad()
def set_ranks(adapters: Iterable[RankAdapter], table: RankTable, ranks: Sequence[int] | Tensor) -> None:
    """Give every expert of a table a new rank; what becomes live in the adapters that use it starts with ``b = 0``.

    Raises:
        ValueError: A rank is out of range, or the pool too small; nothing is changed then.
    """
    born = table.update(table.checked(ranks))
    for adapter in adapters:
        for pool in adapter.pools().values() if adapter.table is table else ():
            zero_rows(pool.lora_B, born)


@torch.no_grad()
def silence_dead(adapters: Iterable[RankAdapter]) -> None:
    """``b = 0`` in the components that are not live: whichever a method makes live later changes no output."""
    for adapter in adapters:
        dead = ~adapter.table.live_rows()
        for pool in adapter.pools().values():
            zero_rows(pool.lora_B, dead)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model holds ``old``, also where a layer is shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def _initial_a(like: Tensor, rows: int) -> Tensor:
    bound = 1 / math.sqrt(max(like.shape[1], 1))
    return like.new_empty(rows, like.shape[1]).uniform_(-bound, bound)
