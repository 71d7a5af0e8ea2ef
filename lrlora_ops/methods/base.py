"""What a rank method is: frozen settings, and the policy that they make over a model's rank tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from lrlora_ops.rank_table import RankTable


class Policy(Protocol):
    """Decides the ranks of the tables it was made for. Knows them by name, and nothing else of the model.

    Attributes:
        total_steps: Optimizer steps of the run, or None until somebody tells.
        budget: What the ranks of all its groups sum to at the end, or None if nothing says.
        frozen: Whether the ranks are final.
        needs_loss: Whether the next step needs the loss.
    """

    total_steps: int | None
    budget: int | None
    frozen: bool

    @property
    def needs_loss(self) -> bool: ...

    def step(self, loss: Tensor | None = None) -> None:
        """Once per optimizer step, after backward: read the sensitivities, set the ranks for the next step.

        The sensitivities are already reduced over the processes and are cleared by the caller afterwards.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors, numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit."""


class Method(Protocol):
    """Settings of a method: a frozen dataclass, so that they can be compared, printed and written to JSON."""

    @property
    def max_rank(self) -> int:
        """Components that an adapter of this method holds."""

    @property
    def initial_rank(self) -> int:
        """Rank of a new adapter, before the policy is made."""

    def policy(self, tables: Mapping[str, RankTable]) -> Policy:
        """The policy over these tables; it may set their ranks at once."""
