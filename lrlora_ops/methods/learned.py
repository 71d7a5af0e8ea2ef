"""LearnedRank: the optimizer learns how long each group's prefix of rank components is.

It follows the published description of LR-LoRA (arXiv 2606.04325): "the adapter rank is learned during the
training process". No code is released, so the estimator is this library's own: nested dropout around a
continuous rank. With one rank ``rho`` per group and ``u`` uniform on (0, 1), each optimizer step

    runs the prefix   k = clamp(round(rho + tau logit(u)), 0, max_rank),  so that
                      P_j = Pr(k > j) = sigmoid((rho - j - 1/2) / tau)
    and estimates     g = dL/drho = sum over j <= k of  c_j P_j (1 - P_j) / tau

from the sensitivities ``c_j = dL/dm_j`` of the prefix and of component k, which runs with gate 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.methods.budget import largest_remainder, project_to_budget
from lrlora_ops.rank_table import RankTable


@dataclass(frozen=True)
class LearnedRank:
    """Settings: a budget of components, learned ranks within it, integers from the freeze on.

    It follows the published description of LR-LoRA (arXiv 2606.04325); how the rank gets its gradient is this library's
    own. Each group has a continuous rank ``rho``; an optimizer step runs a prefix ``k = round(rho + tau logit(u))`` of
    its components, u uniform on (0, 1), and estimates ``dL/drho = sum over j <= k of c_j P_j (1 - P_j) / tau`` from the
    sensitivities c, with ``P_j = sigmoid((rho - j - 1/2) / tau)``. Adam moves rho by it, within the budget.

    A group is a dense layer, or one expert with its projections tied to one rank. The ranks of all groups sum to
    the budget, ``round(mean_rank * groups)``, while they are learned and after they are rounded.

    Args:
        mean_rank: The budget, as components per group. At ``max_rank`` or more, every group gets ``max_rank``.
        max_rank: The most components that a group may have; until the freeze it holds that many.
        total_steps: Optimizer steps of the run; None if the trainer's callback tells it.
        tau: Width of the sampling, in components, at the start and at the freeze; geometric between.
        warmup: Fraction of the run before the ranks move.
        freeze: Fraction of the run after which they are integers and stay.
        lr: Step size of the ranks, in components. None: ``10 * max_rank`` over the number of learning steps,
            within 0.001 to 1. Too small a one is the only danger.
        penalty: Advanced: no budget, but a price per component, in units of the first loss. ``mean_rank`` is
            where the ranks start, and the first step needs the loss, ``step(loss=...)``; a trainer's callback gives it.
            A price does not transfer between tasks.
        seed: Seed of the sampling; the same on all processes.

    Raises:
        ValueError: A setting is out of its range.
    """

    mean_rank: float = 8.0
    max_rank: int = 32
    total_steps: int | None = None
    tau: tuple[float, float] = (1.0, 0.3)
    warmup: float = 0.05
    freeze: float = 0.8
    lr: float | None = None
    penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", tuple(self.tau))
        for name, valid, wanted in (
            ("mean_rank", 0 <= self.mean_rank < math.inf, "a number of at least 0"),
            ("max_rank", isinstance(self.max_rank, int) and self.max_rank >= 1, "an integer of at least 1"),
            ("total_steps", self.total_steps is None or self.total_steps >= 1, "at least 1, or None"),
            ("tau", len(self.tau) == 2 and all(0 < t < math.inf for t in self.tau), "two positive numbers"),
            ("warmup", 0 <= self.warmup < self.freeze, f"at least 0 and less than freeze, {self.freeze}"),
            ("freeze", self.freeze <= 1, "at most 1"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "a positive number, or None"),
            ("penalty", self.penalty is None or 0 <= self.penalty < math.inf, "at least 0, or None for a budget"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def initial_rank(self) -> int:
        return min(round(self.mean_rank), self.max_rank)

    def policy(self, tables: Mapping[str, RankTable]) -> LearnedRankPolicy:
        """The policy over these tables; it samples the prefixes of the first step.

        Raises:
            ValueError: There is no table, or one whose groups do not have ``max_rank`` rows each.
        """
        return LearnedRankPolicy(self, tables)


class LearnedRankPolicy:
    """One continuous rank per group of all tables; a step is tensor operations only, without a host sync.

    Attributes:
        total_steps: Optimizer steps of the run; may be set until the first step.
        budget: What the ranks of all groups sum to; None under a penalty.
        rho: fp64 ``[G]``, the continuous ranks, in the order of the tables and their experts.
        k: int32 ``[G]``, the sampled prefixes of the step to come; the final ranks once frozen.
        frozen: Whether the ranks are final.
    """

    _TENSORS = ("rho", "k", "momentum", "variance", "first_loss")

    def __init__(self, method: LearnedRank, tables: Mapping[str, RankTable]) -> None:
        self.method, self.tables = method, dict(tables)
        self.total_steps = method.total_steps
        self._check_tables()
        self.groups = sum(table.num_experts for table in self.tables.values())
        most = self.groups * method.max_rank
        self.budget = None if method.penalty is not None else min(round(method.mean_rank * self.groups), most)
        start = min(method.mean_rank, method.max_rank) if self.budget is None else self.budget / self.groups
        self.rho = torch.full((self.groups,), start, dtype=torch.float64, device=self._device())
        self.momentum = torch.zeros_like(self.rho)
        self.variance, self.first_loss = self.rho.new_zeros(()), self.rho.new_ones(())
        self.t = self.updates = 0
        self.generator = torch.Generator().manual_seed(method.seed)
        # A budget of nothing or of everything leaves nothing to learn.
        self.frozen = self.budget in (0, most)
        self._choose_prefixes()

    def _check_tables(self) -> None:
        if not self.tables:
            raise ValueError("LearnedRank got no rank table; give it at least one adapter")
        for name, table in self.tables.items():
            if table.max_rank != self.method.max_rank:
                raise ValueError(
                    f"{name} has max_rank {table.max_rank}, but LearnedRank has {self.method.max_rank}; make them equal"
                )
            if not table.reserved:
                raise ValueError(
                    f"{name} shares a pool of {table.pool_size} rows, but LearnedRank needs max_rank rows for every "
                    "group; leave out the pool size when the adapter is made"
                )

    def _device(self) -> torch.device:
        return next(iter(self.tables.values())).gate.device

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> None:
        """Move the ranks by the sensitivities of the step that ran, and choose the prefixes of the next one.

        Args:
            loss: The loss of the step, a scalar tensor that is equal on all processes; needed with ``penalty``,
                whose unit it is, in the first step.

        Raises:
            RuntimeError: ``total_steps`` is not known.
            ValueError: ``penalty`` is set and the first step came without a loss.
        """
        if self.frozen:
            return
        if self.total_steps is None:
            raise RuntimeError(
                "LearnedRank does not know the length of the run: pass total_steps, or give the trainer "
                "adapters.callback()"
            )
        self._follow_the_tables()
        if self.needs_loss:
            if loss is None:
                raise ValueError("penalty is set, so the first step needs the loss: step(loss=loss)")
            self.first_loss.copy_(loss.detach())
        if self.t >= self.method.warmup * self.total_steps:
            self._update(self._gradient(), self.total_steps)
        self.t += 1
        self.frozen = self.t >= self.method.freeze * self.total_steps
        self._choose_prefixes()

    @property
    def needs_loss(self) -> bool:
        """Whether the next step's loss is the unit of the penalty."""
        return self.method.penalty is not None and self.t == 0 and not self.frozen

    def _tau(self) -> float:
        """Width of the sampling at step t; it does not depend on the length of the run at step 0."""
        wide, narrow = self.method.tau
        progress = self.t / (self.method.freeze * self.total_steps) if self.total_steps else 0.0
        return wide * (narrow / wide) ** min(progress, 1.0)

    def _gradient(self) -> Tensor:
        """fp64 ``[G]``: the estimate of dL/drho from the components up to k, k included."""
        tau = self._tau()
        sensitivity = torch.cat([_group_sensitivity(table).to(self.rho.device) for table in self.tables.values()])
        sensitivity = sensitivity.view(self.groups, self.method.max_rank).double()
        j = torch.arange(self.method.max_rank, device=self.rho.device)
        live = torch.sigmoid((self.rho[:, None] - j - 0.5) / tau)
        terms = torch.where(j <= self.k[:, None], sensitivity * live * (1 - live) / tau, 0.0)
        # A step whose gradients overflow, as fp16 steps may, is skipped by the loss scaler: it tells nothing.
        gradient = torch.nan_to_num(terms.sum(1) / self.first_loss, nan=0.0, posinf=0.0, neginf=0.0)
        return gradient + (self.method.penalty or 0.0)

    def _update(self, gradient: Tensor, total_steps: int) -> None:
        """Adam whose second moment is one scalar for all groups, so that their relative importance survives."""
        method = self.method
        self.updates += 1
        self.momentum.mul_(0.9).add_(gradient, alpha=0.1)
        self.variance.mul_(0.99).add_(gradient.square().mean(), alpha=0.01)
        direction = (self.momentum / (1 - 0.9**self.updates)) / (
            (self.variance / (1 - 0.99**self.updates)).sqrt() + 1e-12
        )
        learning = method.freeze - method.warmup
        lr = method.lr or min(max(10 * method.max_rank / (learning * total_steps), 1e-3), 1.0)
        lr *= 1 - 0.9 * (self.t / total_steps - method.warmup) / learning
        self.rho.sub_(direction, alpha=lr).clamp_(0, method.max_rank)
        if self.budget is not None:
            self.rho.copy_(project_to_budget(self.rho, self.budget, method.max_rank))

    def _choose_prefixes(self) -> None:
        """Sample k around rho or, once frozen, round rho; then tell the tables."""
        if self.frozen:
            self.k = self._rounded()
        else:
            u = torch.rand(self.groups, dtype=torch.float64, generator=self.generator) * (1 - 2e-4) + 1e-4
            noise = (self._tau() * torch.logit(u)).to(self.rho.device, non_blocking=True)
            self.k = (self.rho + noise).round().clamp(0, self.method.max_rank).int()
        self._write()

    def _rounded(self) -> Tensor:
        """int32 ``[G]``: rho as integers with the sum of the budget (of rho itself, under a penalty)."""
        return largest_remainder(self.rho, self.rho.sum().round() if self.budget is None else self.budget)

    @torch.no_grad()
    def _write(self) -> None:
        """Write k and rho into the tables, in place: ranks, live prefixes and the zero gate of component k."""
        max_rank, tables = self.method.max_rank, self.tables.values()
        sizes = [table.num_experts for table in tables]
        ranks = self.k if self.frozen else self._rounded()
        torch._foreach_copy_([table.ranks for table in tables], list(ranks.split(sizes)))
        if self.frozen:
            for table in tables:
                table.reset_training_state()
            return
        live = (self.k + 1).clamp(max=max_rank)
        gate = (torch.arange(max_rank, device=self.k.device) != self.k[:, None]).float().flatten()
        torch._foreach_copy_([table.train_ranks for table in tables], list(live.split(sizes)))
        gates = zip(tables, gate.split([max_rank * size for size in sizes]), strict=True)
        torch._foreach_copy_(
            [projection for table in tables for projection in table.gate.chunk(table.num_projections)],
            [part for table, part in gates for _ in range(table.num_projections)],
        )

    def _follow_the_tables(self) -> None:
        """A model may move to another device after its adapters are made."""
        for name in self._TENSORS:
            setattr(self, name, getattr(self, name).to(self._device()))

    def state_dict(self) -> dict[str, Any]:
        """The continuous ranks, their optimizer, the generator and the prefixes in use."""
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        return tensors | {
            "generator": self.generator.get_state(),
            "t": self.t,
            "updates": self.updates,
            "total_steps": self.total_steps or 0,
            "frozen": self.frozen,
            "tables": "\n".join(self.tables),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: The state is of other adapters.
        """
        if state["tables"] != "\n".join(self.tables) or state["rho"].numel() != self.groups:
            raise ValueError(
                "this state of LearnedRank is of other adapters; apply the method to the same targets of the same model"
            )
        for name in self._TENSORS:
            setattr(self, name, state[name].to(self._device(), copy=True))
        self.generator.set_state(state["generator"].cpu())
        self.t, self.updates, self.frozen = int(state["t"]), int(state["updates"]), bool(state["frozen"])
        self.total_steps = int(state["total_steps"]) or self.total_steps
        self._write()


def _group_sensitivity(table: RankTable) -> Tensor:
    """fp32 or fp64 ``[R]``: ``dL/dm`` of components with one gate for all projections, the sum of theirs."""
    if table.num_projections == 1:
        return table.sensitivity
    return table.sensitivity.view(table.num_projections, -1).sum(0, dtype=torch.float64)
