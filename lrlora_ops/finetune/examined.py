"""``lrlora doctor``: does every adapter of a model, new ones or trained ones, train, act and merge on this machine?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lrlora_ops import Adapters, apply_lora, load_adapter
from lrlora_ops.doctor import Finding, Report, examine
from lrlora_ops.finetune.bandwidth import copy_bandwidth, judged
from lrlora_ops.finetune.config import METHODS
from lrlora_ops.finetune.errors import CheckFailed, CommandError
from lrlora_ops.finetune.machine import describe, pick_device
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.ops._backends import backend_reason

ROWS, TOKENS, SEED = 2, 16, 0
_RUN_FILES = ("lrlora_state.json", "adapter_config.json")


def examine_directory(
    directory: Path,
    base: Path | None,
    method: str,
    targets: Sequence[str] | None,
    device_name: str,
    dtype: str,
    console: Console,
) -> None:
    """Print what ``examine`` finds, and what runs where.

    Args:
        directory: A model, which gets new adapters, or the adapters of a run.
        base: The model of a run.
        method: A key of ``METHODS``, for new adapters.
        targets: Of new adapters; None for all linear layers, or the experts if the method is for them.
        device_name: As ``pick_device`` takes it.
        dtype: As ``load_pretrained`` takes it.
        console: To print on.

    Raises:
        CommandError: The input cannot be used.
        CheckFailed: A check does not hold.
    """
    device = pick_device(device_name)
    torch.manual_seed(SEED)
    adapters = _adapted(directory, base, method, targets, device, dtype)
    console.print(describe(device), style="bold", highlight=False)
    console.print(f"  backend: {backend_reason(device)}", highlight=False, soft_wrap=True)
    config: Any = adapters.model.config
    tokens = torch.randint(config.get_text_config().vocab_size, (ROWS, TOKENS), device=device)
    report = examine(adapters, {"input_ids": tokens, "use_cache": False})
    _print_coverage(report, console)
    findings = [*report.findings, *_gpu(device)]
    for finding in findings:
        line, style = f"{'PASS' if finding.passed else 'FAIL'}  {finding.check}: {finding.detail}", "green"
        console.print(line, style=style if finding.passed else "red", highlight=False, soft_wrap=True, markup=False)
        if not finding.passed:
            console.print(f"      fix: {finding.fix}", highlight=False, soft_wrap=True, markup=False)
    for remark in report.remarks:
        console.print(f"NOTE  {remark}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if failed := sum(not finding.passed for finding in findings):
        raise CheckFailed(f"{failed} of {len(findings)} checks failed, see FAIL and fix above")


def _adapted(
    directory: Path, base: Path | None, method: str, targets: Sequence[str] | None, device: torch.device, dtype: str
) -> Adapters:
    is_run = any((directory / name).is_file() for name in _RUN_FILES)
    if is_run and base is None:
        raise CommandError(f"{directory} holds adapters: add --model DIRECTORY, the model that they were trained on")
    if not is_run and base is not None:
        raise CommandError(f"{directory} holds no adapters, which --model is for: leave --model out, or give a RUN")
    if is_run and targets:
        raise CommandError(f"{directory} holds adapters, whose targets are settled: leave --targets out")
    model: Any = load_pretrained(base or directory, device, dtype)[0]
    try:
        if is_run:
            return load_adapter(model, directory)
        return apply_lora(model, METHODS[method](), targets or ["experts" if method == "dynamic" else "all-linear"])
    except ValueError as error:
        raise CommandError(str(error)) from error


def _gpu(device: torch.device) -> list[Finding]:
    """The bandwidth of a GPU; nothing on a CPU."""
    if device.type != "cuda":
        return []
    passed, text = judged(torch.cuda.get_device_name(device), copy_bandwidth(device))
    fix = "" if passed else "see in nvidia-smi or rocm-smi who else uses the GPU, its clocks and its power limit"
    return [Finding("memory is as fast as it should be", passed, text, fix)]


def _print_coverage(report: Report, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    for column in ("number", "parameters", "sum of ranks"):
        table.add_column(column, justify="right")
    table.add_column("not adapted, because", overflow="fold")
    for row in report.coverage:
        rank = "" if row.rank is None else f"{row.rank:,}"
        table.add_row(row.kind, f"{row.layers:,}", f"{row.parameters:,}", rank, row.reason)
    console.print(table, highlight=False)
