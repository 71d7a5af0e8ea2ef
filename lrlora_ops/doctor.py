"""examine: does every adapter of a model train, act, and merge? One small batch answers, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrlora_ops._coverage import Coverage, coverage
from lrlora_ops._probe import Probe, probe, undisturbed
from lrlora_ops._sharding import require_whole
from lrlora_ops.adapters import Adapters
from lrlora_ops.modules._adapter import RankAdapter
from lrlora_ops.modules._quantised import is_quantised


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: What must hold.
        passed: Whether it does.
        detail: Counts, or the names of those for which it does not hold and why.
        fix: What to do; "" if it holds.
    """

    check: str
    passed: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """What ``examine`` found: its checks, the coverage of the model, and remarks that are no failures."""

    findings: tuple[Finding, ...]
    coverage: tuple[Coverage, ...]
    remarks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            lines.append(f"{'PASS' if finding.passed else 'FAIL'}  {finding.check}: {finding.detail}{fix}")
        return "\n".join([*lines, *(f"NOTE  {remark}" for remark in self.remarks)])


def examine(adapters: Adapters, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Report:
    """Prove on one batch that every adapter is called, gets gradient, moves the output, and merges.

    The model runs twice forward, in training mode, without and with random updates of all adapters, and once backward
    from a random weighting of its outputs. The gradient of an adapter's components is what their update does to the
    output, to first order. Then each layer is merged, for itself, and compared with its adapter.
    Parameters, buffers, gradients, statistics and random numbers are bit for bit what they were.

    Args:
        adapters: Of the model, made by ``apply_lora`` or ``load_adapter``.
        inputs: A small batch on the model's device, of two positions or more if there is attention, whose queries and
            keys choose nothing among one: a mapping is given as keywords, a tuple or list as arguments, and
            anything else as the only argument.

    Returns:
        The report; ``print`` shows it, ``passed`` is for scripts.

    Raises:
        ValueError: The adapters are merged, or divided among processes.
    """
    if not adapters.modules:
        raise ValueError("the adapters are merged: there is none to examine; examine before merge()")
    require_whole(adapters.parameters(), "an examination")
    ranked = {name: module for name, module in adapters.modules.items() if int(module.table.ranks.max()) > 0}
    diseased = _not_finite(adapters)
    unable = {name: trouble for name, module in ranked.items() if (trouble := _dead(module))}
    with undisturbed(adapters):
        unable |= {name: trouble for name, module in ranked.items() if (trouble := _gated(module))}
        seen = probe(adapters, inputs)
        able = {name: module for name, module in ranked.items() if name not in unable}
        findings = [
            _has_ranks(adapters, ranked),
            _runs(seen),
            _finding("every adapter can act", unable, f"{len(ranked)} adapters"),
            _trains(able, seen),
            _moves(ranked, seen),
            _is_finite(adapters, seen, diseased),
            _merges(adapters, [name for name in ranked if name not in diseased]),
        ]
        remarks = [remark for look in _REMARKS for remark in look(adapters)]
    return Report(tuple(findings), tuple(coverage(adapters)), tuple(remarks))


Trouble = tuple[str, str]  # what is wrong with an adapter, and the fix


def _finding(check: str, troubles: Mapping[str, Trouble], fine: str) -> Finding:
    """Holds if there is no trouble; the adapters with the same trouble are named together."""
    if not troubles:
        return Finding(check, True, fine)
    groups: dict[Trouble, list[str]] = {}
    for name, trouble in troubles.items():
        groups.setdefault(trouble, []).append(name)
    detail = "; ".join(f"{_names(names)}: {what}" for (what, _), names in groups.items())
    return Finding(check, False, detail, "; ".join(dict.fromkeys(fix for _, fix in groups)))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _has_ranks(adapters: Adapters, ranked: Mapping[str, RankAdapter]) -> Finding:
    check, total = "there are ranks", len(adapters.modules)
    if ranked:
        return Finding(check, True, f"{len(ranked)} of {total} adapters have a rank above 0")
    fix = "raise the method's rank or budget: FixedRank(rank=8), LearnedRank(mean_rank=8)"
    return Finding(check, False, f"all {total} adapters have rank 0, so nothing trains", fix)


def _runs(seen: Probe) -> Finding:
    check = "forward and backward run in training mode"
    if not seen.error:
        return Finding(check, True, "one batch")
    return Finding(check, False, seen.error, "put this right first; the checks of calls and gradients depend on it")


def _dead(module: RankAdapter) -> Trouble | None:
    """What keeps an adapter from acting whatever the model does with it."""
    live = module.table.live_rows()
    pools = module.pools().values()
    if module.scaling == 0:
        return "the scaling is 0", "give apply_lora a lora_alpha above 0"
    if not all(parameter.requires_grad for pool in pools for parameter in (pool.lora_A, pool.lora_B)):
        return "parameters that do not require a gradient", "for p in adapters.parameters(): p.requires_grad_()"
    if any(not (pool.lora_A[live].any() or pool.lora_B[live].any()) for pool in pools):
        return "A and B are both 0, which no gradient can leave", "initialise A at random"
    return None


def _gated(module: RankAdapter) -> Trouble | None:
    table = module.table
    gates = table.gate.detach().view(table.num_projections, -1)[:, table.live_rows()]
    closed = int((gates == 0).sum())
    if not closed:
        return None
    return (
        f"the gates of {closed} of {gates.numel()} live components are 0, so that they add nothing",
        "adapter.table.reset_training_state() opens the gates",
    )


def _trains(able: Mapping[str, RankAdapter], seen: Probe) -> Finding:
    check = "every adapter is called and gets gradient"
    if seen.error:
        return Finding(check, False, "not known, for the batch did not run to its end", "see the check above")
    idle = {name: trouble for name, module in able.items() if (trouble := _idle(name, module, seen))}
    return _finding(check, idle, f"{len(able)} adapters")


def _idle(name: str, module: RankAdapter, seen: Probe) -> Trouble | None:
    """Why an adapter would not train in this model."""
    if name not in seen.called:
        return (
            "never called by the forward",
            "leave them out of targets, or call the layer where the model reads its weight",
        )
    gradients = [p.grad for pool in module.pools().values() for p in (pool.lora_A, pool.lora_B)]
    if any(gradient is None for gradient in gradients):
        return (
            "called, but no gradient comes back",
            "look for no_grad or detach around or behind them; with activation checkpointing use use_reentrant=False",
        )
    if any(not gradient.any() for gradient in gradients if gradient is not None):
        return (
            "called, but the gradient is 0",
            "look for what multiplies their output by 0, drops it, or rounds it away",
        )
    return None


def _moves(ranked: Mapping[str, RankAdapter], seen: Probe) -> Finding:
    """By the gradients of the gates, which are what an update does to the output, to first order."""
    check = "every adapter moves the output"
    still = [name for name, module in ranked.items() if module.reports_sensitivity and not module.sensitivity.any()]
    if seen.moved and not still:
        return Finding(check, True, f"{len(ranked)} adapters")
    detail = f"{_names(still)} do not" if still else "the updates of all of them leave it bit for bit as it was"
    return Finding(check, False, detail, "see the checks above for the reason")


def _not_finite(adapters: Adapters) -> dict[str, Trouble]:
    """Parameters with a NaN or an infinity; those of an adapter go by the adapter's name."""
    owners = {
        id(parameter): name for name, module in adapters.modules.items() for parameter in module.trained().values()
    }
    return {
        owners.get(id(parameter), name): (
            "NaN or infinity in the weights",
            "load the weights again, from before they broke",
        )
        for name, parameter in adapters.model.named_parameters()
        if parameter.is_floating_point() and not parameter.is_meta and not parameter.isfinite().all()
    }


def _is_finite(adapters: Adapters, seen: Probe, diseased: Mapping[str, Trouble]) -> Finding:
    """Weights that are not explain what is computed from them."""
    troubles = diseased or ({} if seen.error else _overflown(adapters, seen))
    return _finding("all values are finite", troubles, "weights" if seen.error else "weights, output, gradients")


def _overflown(adapters: Adapters, seen: Probe) -> dict[str, Trouble]:
    """The first adapter whose output, or else whose gradient, is not finite."""
    precision = "load the model in bfloat16 or float32"
    if seen.infinite or not seen.output_finite:
        first = seen.infinite[0] if seen.infinite else "the model"
        return {first: ("NaN or infinity in the output, of finite weights", precision)}
    for name, parameter in adapters.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return {name: ("NaN or infinity in the gradient", precision)}
    return {}


def _merges(adapters: Adapters, names: Sequence[str]) -> Finding:
    """Each layer for itself, as ``Adapters.merge`` does it; quantised weights are left out, for they round updates."""
    troubles: dict[str, Trouble] = {}
    tried = [name for name in names if not _is_quantised(adapters.modules[name])]
    for name in tried:
        try:
            adapters.modules[name].merge_into(adapters.model.get_submodule(name))
        except (ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            fix = "do not merge: save the adapters and load them beside the base, or export(format='peft')"
            troubles[name] = (str(error), fix)
    return _finding("a merged layer computes what its adapter does", troubles, f"{len(tried)} adapters")


def _is_quantised(module: RankAdapter) -> bool:
    base = getattr(module, "base_layer", None)
    return base is not None and is_quantised(base)


def _without_rank(adapters: Adapters) -> Iterator[str]:
    idle = [name for name, module in adapters.modules.items() if not module.table.ranks.any()]
    if idle:
        yield f"rank 0 now: {_names(idle)}"


def _without_rows(adapters: Adapters) -> Iterator[str]:
    counts = [table.row_counts for table in adapters.tables.values() if table.num_experts > 1]
    if idle := sum(int((rows == 0).sum()) for rows in counts):
        total = sum(rows.numel() for rows in counts)
        yield f"{idle} of {total} experts got no row of this batch, so that nothing is proved of them alone"


def _unmerged(adapters: Adapters) -> Iterator[str]:
    if quantised := [name for name, module in adapters.modules.items() if _is_quantised(module)]:
        yield f"not merged, for their weights are quantised: {_names(quantised)}"


def _unread(adapters: Adapters) -> Iterator[str]:
    if offloaded := [name for name, parameter in adapters.model.named_parameters() if parameter.is_meta]:
        yield f"not searched for NaN, for they are offloaded: {_names(offloaded)}"


def _also_trained(adapters: Adapters) -> Iterator[str]:
    own = {id(parameter) for parameter in adapters.parameters()}
    others = [name for name, p in adapters.model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        yield f"require a gradient beside the adapters: {_names(others)}"


_REMARKS = (_without_rank, _without_rows, _unmerged, _unread, _also_trained)
