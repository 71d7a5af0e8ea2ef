"""DynamicRank: the experts of a Mixture-of-Experts grow their ranks while they train, where it pays.

It follows the released algorithm of DR-LoRA (arXiv 2601.04823). Every optimizer step updates two averages,

    demand of expert i        f_i <- decay f_i + n_i,  what was routed to it
    importance of component j g_j <- decay g_j + (1 - decay) |c_j|,  if its expert got rows; c_j = dL/dm_j

and every ``interval`` steps each layer hands out new components, its experts in descending order of

    S_i = f_i g_i / (r_i + 1)^gamma

with f and g as shares of the layer's sums, and g_i the mean over the expert's live components and projections.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.rank_table import RankTable

EPSILON = 1e-6  # added to both shares, so that a share of zero leaves the other one to decide


@dataclass(frozen=True)
class DynamicRank:
    """Settings: experts start at ``initial_rank`` and grow, layer by layer, to ``target_rank`` in the mean.

    The released algorithm of DR-LoRA (arXiv 2601.04823). A layer hands out components to its experts in descending
    order of ``S_i = f_i g_i / (r_i + 1)^gamma``: f is an average of n, what is routed to an expert, and g one of the
    sensitivities ``|c_j|`` of its components, both as shares of the layer's sums; r is its rank.

    Growth is at ``floor(warmup * total_steps)`` optimizer steps and every ``interval`` steps from there, the last
    time no later than ``interval`` steps before the end. All projections of an expert grow together.

    Args:
        initial_rank: Rank of every expert at the start.
        target_rank: Mean rank of the experts of a layer at the end.
        max_rank: The highest rank of one expert.
        total_steps: Optimizer steps of the run; None if the trainer's callback tells it.
        interval: Optimizer steps between two growths.
        warmup: Fraction of the run before the first growth.
        gamma: Exponent of the penalty on experts that are large already.
        decay: Of both averages, per optimizer step.
        grow_fraction: One growth gives an expert at most ``ceil(grow_fraction * (max_rank - initial_rank))``
            components, and may give it one.
        score: "paper", S as above; or "saliency", f = 1 and gamma = 0, for c already sums over an expert's
            rows, so that f counts its load twice. The latter is this library's own.
        variant: "exact": n is the sum of the routing weights, and a layer ends at exactly ``target_rank`` in the
            mean. "released": as in the authors' code, where n is the number of rows, g is updated twice per step
            (decay squared), and the components of a growth are counted per expert but held against a total per
            projection: with two projections growth ends after half of the run, a little above the target.

    Raises:
        ValueError: A setting is out of its range.
    """

    initial_rank: int = 8
    target_rank: int = 16
    max_rank: int = 32
    total_steps: int | None = None
    interval: int = 200
    warmup: float = 0.03
    gamma: float = 1.2
    decay: float = 0.9
    grow_fraction: float = 0.1
    score: str = "paper"
    variant: str = "exact"

    def __post_init__(self) -> None:
        ranks = (self.initial_rank, self.target_rank, self.max_rank)
        for name, valid, wanted in (
            ("initial_rank", isinstance(ranks[0], int) and ranks[0] >= 0, "an integer of at least 0"),
            ("max_rank", isinstance(ranks[2], int) and ranks[2] >= 1, "an integer of at least 1"),
            (
                "target_rank",
                isinstance(ranks[1], int) and list(ranks) == sorted(ranks),
                f"an integer from initial_rank, {ranks[0]}, to max_rank, {ranks[2]}",
            ),
            ("total_steps", self.total_steps is None or self.total_steps >= 1, "at least 1, or None"),
            ("interval", isinstance(self.interval, int) and self.interval >= 1, "an integer of at least 1"),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and less than 1"),
            ("gamma", 0 <= self.gamma < math.inf, "a number of at least 0"),
            ("decay", 0 <= self.decay < 1, "at least 0 and less than 1"),
            ("grow_fraction", 0 <= self.grow_fraction <= 1, "from 0 to 1"),
            ("score", self.score in ("paper", "saliency"), '"paper" or "saliency"'),
            ("variant", self.variant in ("exact", "released"), '"exact" or "released"'),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def cap(self) -> int:
        """The most components that one growth gives to one expert."""
        return max(1, math.ceil(self.grow_fraction * (self.max_rank - self.initial_rank)))

    @property
    def pool_rank(self) -> int:
        """Components per expert that the pool of a layer holds: "released" may overshoot by one growth."""
        return self.target_rank if self.variant == "exact" else min(self.target_rank + self.cap, self.max_rank)

    def policy(self, tables: Mapping[str, RankTable]) -> DynamicRankPolicy:
        """The policy over these tables, whose ranks are ``initial_rank``.

        Raises:
            ValueError: There is no table, or one that is too small, or the run is too short to grow in.
        """
        return DynamicRankPolicy(self, tables)


class DynamicRankPolicy:
    """Grows the experts of each table by its own statistics; a step never waits for the device.

    Attributes:
        total_steps: Optimizer steps of the run; may be set until the first step.
        budget: What the ranks of all experts sum to at the end; "released" ends a little above.
        t: Optimizer steps so far.
        frozen: Whether the last growth is over.
    """

    needs_loss = False

    def __init__(self, method: DynamicRank, tables: Mapping[str, RankTable]) -> None:
        self.method, self.tables = method, dict(tables)
        self._check_tables()
        by_shape: dict[tuple[int, ...], dict[str, RankTable]] = {}
        for name, table in self.tables.items():
            shape = (table.num_projections, table.num_experts, table.max_rank, table.pool_size)
            by_shape.setdefault(shape, {})[name] = table
        self.layers = [_Layers(alike, method.max_rank) for alike in by_shape.values()]
        self.budget: int | None = method.target_rank * sum(table.num_experts for table in tables.values())
        self.t = 0
        self.frozen = method.initial_rank == method.target_rank
        self.total_steps = method.total_steps
        if self.total_steps is not None and not self.frozen:
            self._growths(self.total_steps)

    def _check_tables(self) -> None:
        method = self.method
        if not self.tables:
            raise ValueError("DynamicRank got no rank table; give it at least one adapter")
        for name, table in self.tables.items():
            if table.max_rank < method.max_rank:
                raise ValueError(
                    f"{name} has max_rank {table.max_rank}, but DynamicRank has {method.max_rank}; raise the adapter's "
                    "max_rank or lower the method's"
                )
            if table.pool_size < table.num_experts * method.pool_rank:
                raise ValueError(
                    f"{name} has a pool of {table.pool_size} rows for {table.num_experts} experts, but DynamicRank "
                    f"needs {method.pool_rank} for each; make the adapter with pool_rank={method.pool_rank}"
                )
        dense = [name for name, table in self.tables.items() if table.num_experts == 1]
        if dense:
            warnings.warn(
                f"DynamicRank divides a layer's components among its experts, but {', '.join(dense[:3])}"
                f"{f' and {len(dense) - 3} more' if len(dense) > 3 else ''} has one: it just grows to target_rank; "
                "use LearnedRank for dense layers",
                stacklevel=4,
            )

    def _growths(self, total_steps: int) -> range:
        """The steps at which the layers grow.

        Raises:
            ValueError: There is none, or the target cannot be reached in them.
        """
        method = self.method
        start = math.floor(method.warmup * total_steps)
        growths = range(start, total_steps - method.interval + 1, method.interval)
        if not growths:
            raise ValueError(
                f"a run of {total_steps} steps has no growth: the first would be at step {start}, the last "
                f"{method.interval} before the end; lower interval or warmup"
            )
        if method.variant == "exact" and len(growths) * method.cap < method.target_rank - method.initial_rank:
            raise ValueError(
                f"{len(growths)} growths of at most {method.cap} components do not bring every expert from rank "
                f"{method.initial_rank} to {method.target_rank}; lower interval or raise grow_fraction"
            )
        return growths

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> None:
        """Take in the statistics of the step that ran and, if it is time, grow.

        Args:
            loss: Not used.

        Raises:
            RuntimeError: ``total_steps`` is not known.
            ValueError: The run is too short to grow in.
        """
        if self.frozen:
            return
        if self.total_steps is None:
            raise RuntimeError(
                "DynamicRank does not know the length of the run: pass total_steps, or give the trainer "
                "adapters.callback()"
            )
        growths = self._growths(self.total_steps)
        for layers in self.layers:
            layers.accumulate(self.method)
            if self.t in growths:
                layers.grow(self.method, len(growths), len(growths) - growths.index(self.t))
        self.frozen = self.t >= growths[-1]
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """The averages and the step; the ranks themselves are in the tables' own state dicts."""
        state: dict[str, Any] = {"t": self.t, "total_steps": self.total_steps or 0, "frozen": self.frozen}
        for layers in self.layers:
            for name, demand, importance in zip(layers.tables, layers.demand, layers.importance, strict=True):
                state |= {f"demand.{name}": demand.clone(), f"importance.{name}": importance.clone()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: The state is of other adapters.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or any(
            value.shape != state[key].shape for key, value in own.items() if isinstance(value, Tensor)
        ):
            raise ValueError(
                "this state of DynamicRank is of other adapters; apply the method to the same targets of the same model"
            )
        for layers in self.layers:
            layers.demand = torch.stack([state[f"demand.{name}"] for name in layers.tables])
            layers.importance = torch.stack([state[f"importance.{name}"] for name in layers.tables])
        self.t, self.frozen = int(state["t"]), bool(state["frozen"])
        self.total_steps = int(state["total_steps"]) or self.total_steps


class _Layers:
    """L tables of one shape, their statistics stacked: a step is a few operations however many layers there are.

    Attributes:
        demand: fp64 ``[L, E]``, f.
        importance: fp64 ``[L, P, E, max_rank]``, g by place within the expert; zero beyond its rank.
    """

    def __init__(self, tables: Mapping[str, RankTable], max_rank: int) -> None:
        self.tables, self.first = tables, next(iter(tables.values()))
        shape = (len(tables), self.first.num_projections, self.first.num_experts, max_rank)
        self.importance = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.demand = self.importance.new_zeros(shape[0], shape[2])

    @property
    def device(self) -> torch.device:
        return self.first.gate.device

    def _read(self, attribute: Callable[[RankTable], Tensor]) -> Tensor:
        return torch.stack([attribute(table).detach().to(self.device) for table in self.tables.values()])

    def accumulate(self, method: DynamicRank) -> None:
        """Update both averages; what is not finite, as in fp16 steps that are skipped, tells nothing."""
        # A model may move to another device after its adapters are made.
        demand, importance = self.demand.to(self.device), self.importance.to(self.device)
        released = method.variant == "released"
        rows, weights = self._read(lambda table: table.routed).double().unbind(1)
        arrived = torch.nan_to_num(rows if released else weights, nan=0.0, posinf=0.0, neginf=0.0)
        self.demand = method.decay * demand + arrived

        num_layers, num_projections, _, max_rank = importance.shape
        components = self._read(lambda table: table.components[:, :max_rank]).long().view(num_layers, 1, -1)
        c = self._read(lambda table: table.sensitivity).double().view(num_layers, num_projections, -1)
        saliency = c.gather(2, components.expand(-1, num_projections, -1)).abs().view_as(importance)
        live = torch.arange(max_rank, device=self.device) < self._read(lambda table: table.ranks)[..., None]
        told = (live & (rows > 0)[..., None])[:, None] & saliency.isfinite()
        decay = method.decay**2 if released else method.decay
        self.importance = torch.where(told, decay * importance + (1 - decay) * saliency, importance)

    def grow(self, method: DynamicRank, growths: int, left: int) -> None:
        """Hand out the components of one growth; ``left`` of ``growths`` are to come, this one included."""
        ranks = self._read(lambda table: table.ranks).long()
        order = self._scores(method, ranks).argsort(dim=-1, descending=True, stable=True)
        room = (method.max_rank - ranks).clamp(min=0)
        now = room.clamp(max=method.cap)
        quota = self._quota(method, ranks, growths, left)
        grown = torch.zeros_like(ranks)
        if method.variant == "exact":
            # An expert far below the maximum can only use all its room if it grows in each growth that is left.
            # Should the target depend on that, such room goes first; else it changes nothing.
            later = room.clamp(max=method.cap * (left - 1))
            needed = (self._missing(method, ranks) - later.sum(-1)).clamp(min=0).minimum(quota)
            grown = _hand_out(needed, (room - later).clamp(max=method.cap), order)
            quota = quota - needed
        grown = grown + _hand_out(quota, now - grown, order)
        # No expert ever shrinks, so a free row was never live: its lora_B is zero still, and the output stays.
        for table, new in zip(self.tables.values(), (ranks + grown).unbind(), strict=True):
            table.update(new.to(table.ranks.device))
        self.importance = self.importance * (grown.sum(-1) == 0)[:, None, None, None]

    def _missing(self, method: DynamicRank, ranks: Tensor) -> Tensor:
        """int64 ``[L]``: components, each with all its projections, that a layer is short of the target."""
        return (ranks.shape[1] * method.target_rank - ranks.sum(-1)).clamp(min=0)

    def _quota(self, method: DynamicRank, ranks: Tensor, growths: int, left: int) -> Tensor:
        """int64 ``[L]``: components that one growth hands out."""
        _, num_projections, num_experts, _ = self.importance.shape
        missing = self._missing(method, ranks)
        if method.variant == "released":
            total = num_experts * num_projections * (method.target_rank - method.initial_rank)
            return torch.where(missing > 0, -(-total // growths), 0)
        # Rounded up over the projections; the next growth has what they cannot share equally.
        return (num_projections * missing + left - 1) // left // num_projections

    def _scores(self, method: DynamicRank, ranks: Tensor) -> Tensor:
        """fp64 ``[L, E]``: S."""
        importance = _share((self.importance.sum(-1) / ranks.clamp(min=1)[:, None]).mean(1))
        if method.score == "saliency":
            return importance
        # Looked up, for a vectorised pow may round equal numbers apart, and then they would not tie.
        sizes = torch.arange(1, self.first.max_rank + 2, device=self.device).double().pow(method.gamma)
        return _share(self.demand) * importance / sizes[ranks]


def _share(x: Tensor) -> Tensor:
    """Each expert's part of its layer's sum, plus epsilon; a layer without any has epsilon alone."""
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) + EPSILON


def _hand_out(quota: Tensor, room: Tensor, order: Tensor) -> Tensor:
    """int64 ``[L, E]``: what each expert gets of ``quota``, ``[L]``, if each in ``order`` takes all its ``room``."""
    taken = room.gather(-1, order)
    before = taken.cumsum(-1) - taken
    return torch.zeros_like(room).scatter(-1, order, (quota[:, None] - before).clamp(min=0).minimum(taken))
