"""What must hold of any run, whatever it came to: lines of PASS and FAIL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from torch import nn

from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.errors import CheckFailed

OTHER_SEED = -1  # of adapters whose values are about to be replaced, so that none can be right by chance


def same_budget(arms: Sequence[Arm]) -> dict[str, bool]:
    """Whether the arms have equal numbers of parameters and equal sums of ranks."""
    names = ", ".join(arm.plan.name for arm in arms)
    parameters, ranks = [arm.parameters for arm in arms], [sum(arm.ranks) for arm in arms]
    return {
        f"{names}: {parameters[0]:,} adapter parameters each": len(set(parameters)) == 1,
        f"{names}: ranks that sum to {ranks[0]:,} each": len(set(ranks)) == 1,
    }


def comes_back(
    directory: Path, plan: ArmPlan, steps: int, model: nn.Module, texts: Texts, bits: Mapping[str, float]
) -> dict[str, bool]:
    """Whether saved adapters predict held-out text as they did before they were saved.

    Args:
        directory: Where ``Adapters.save`` wrote them.
        plan: What they were made by.
        steps: Of their run.
        model: A fresh copy of the model, without adapters.
        texts: What was measured.
        bits: What it came to.

    Raises:
        CheckFailed: They cannot even be loaded.
    """
    adapters = plan.apply(model, steps, OTHER_SEED)
    try:
        adapters.load(directory)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{directory} was written, but cannot be loaded: {error}") from error
    text = f"{directory} loaded into a fresh copy of the model gives the same bits per byte"
    return {text: texts.measure(model) == bits}


def print_checks(console: Console, checks: Mapping[str, bool]) -> None:
    """A line for each.

    Raises:
        CheckFailed: Not all hold.
    """
    for text, passed in checks.items():
        console.print(f"{'PASS' if passed else 'FAIL'}  {text}", style="green" if passed else "red", highlight=False)
    if failed := len(checks) - sum(checks.values()):
        raise CheckFailed(
            f"{failed} of {len(checks)} checks failed, see FAIL above: do not use what this run wrote, and report it"
        )
