"""What must hold of any run, whatever it came to: lines of PASS and FAIL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.errors import CheckFailed
from lrlora_ops.finetune.ranks import rank_list
from lrlora_ops.finetune.tokens import batches
from lrlora_ops.finetune.trainer import Recipe, batch_loss

OTHER_SEED = -1  # of adapters whose values are about to be replaced, so that none can be right by chance


def same_budget(arms: Sequence[Arm]) -> dict[str, bool]:
    """Whether the arms have equal numbers of parameters and equal sums of ranks; a few coefficients are left out."""
    names = ", ".join(arm.plan.name for arm in arms)
    ranks = [sum(arm.ranks) for arm in arms]
    parameters = [
        sum(p.numel() for name, p in arm.adapters.named_parameters() if not name.endswith(".coefficients"))
        for arm in arms
    ]
    more = [
        f", and {c} coefficients of {arm.plan.name}"
        for arm, p in zip(arms, parameters, strict=True)
        if (c := arm.parameters - p)
    ]
    return {
        f"{names}: {parameters[0]:,} adapter parameters each{''.join(more)}": len(set(parameters)) == 1,
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
        texts: What to measure again.
        bits: What that, or more than that, came to before.

    Raises:
        CheckFailed: They cannot even be loaded.
    """
    adapters = plan.apply(model, steps, OTHER_SEED)
    try:
        adapters.load(directory)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{directory} was written, but cannot be loaded: {error}") from error
    text = f"{directory} loaded into a fresh copy of the model gives the same bits per byte"
    again = texts.measure(model)
    return {text: again == {name: bits[name] for name in again}}


def growth_keeps_output(plan: ArmPlan, recipe: Recipe, model: nn.Module, texts: Texts, seed: int) -> dict[str, bool]:
    """Whether a growth of the ranks, of adapters that are trained up to it, changes no bit of the model's output.

    Args:
        plan: Its ranks grow.
        recipe: Of its run; it is trained as far as the first growth.
        model: A fresh copy of the model, without adapters.
        texts: What the run trains on.
        seed: Of the run.
    """
    adapters = plan.apply(model, recipe.steps, seed)
    optimizer = torch.optim.AdamW(adapters.parameters(), recipe.lr, recipe.betas, weight_decay=0.0)
    device = adapters.parameters()[0].device
    probe = next(batches(texts.train, texts.seq_len, 1, OTHER_SEED))[:1].to(device)
    grown, unchanged = 0, False
    for batch in batches(texts.train, texts.seq_len, recipe.steps, seed):
        batch_loss(model.train(), batch.to(device)).backward()
        ranks, before = sum(rank_list(adapters)), _logits(model, probe)
        adapters.step()
        grown = sum(rank_list(adapters)) - ranks
        if grown:
            unchanged = torch.equal(_logits(model, probe), before)
            break
        optimizer.step()
        optimizer.zero_grad()
    trained = any(bool(p.any()) for name, p in adapters.named_parameters() if name.endswith("lora_B"))
    text = f"{plan.name}: output bit-identical across a growth by {grown} components"
    return {text: grown > 0 and trained and unchanged}


@torch.no_grad()
def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model.eval()(input_ids=batch).logits


def print_checks(console: Console, checks: Mapping[str, bool]) -> None:
    """A line for each.

    Raises:
        CheckFailed: Not all hold.
    """
    for text, passed in checks.items():
        line, style = f"{'PASS' if passed else 'FAIL'}  {text}", "green" if passed else "red"
        console.print(line, style=style, highlight=False, soft_wrap=True)
    if failed := len(checks) - sum(checks.values()):
        raise CheckFailed(
            f"{failed} of {len(checks)} checks failed, see FAIL above: do not use what this run wrote, and report it"
        )
