"""Fine-tuning of the user's model on the user's files: a new run, and one that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from lrlora_ops.finetune import checkpoints
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.checks import comes_back, print_checks
from lrlora_ops.finetune.config import FineTuneConfig
from lrlora_ops.finetune.config_file import read_config
from lrlora_ops.finetune.endings import ENDINGS, explained
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.files import prepare_output
from lrlora_ops.finetune.inputs import Inputs, encode_inputs, read_inputs
from lrlora_ops.finetune.machine import describe, peak_memory, pick_device
from lrlora_ops.finetune.outcome import draw_ranks, print_ranks, print_results
from lrlora_ops.finetune.pretrained import load_pretrained
from lrlora_ops.finetune.trainer import Recipe

CONFIG_FILE = "config.yaml"


def run_fine_tuning(config: FineTuneConfig, console: Console) -> None:
    """Train, measure, save, check.

    Raises:
        CommandError: The input cannot be used, or the run cannot go on; each kind has an exit code.
        CheckFailed: What was saved is not what was trained.
    """
    inputs = read_inputs(config.train, config.eval_fraction)
    prepare_output(config.output)
    written = config.model_copy(
        update={"model": config.model.absolute(), "train": [path.absolute() for path in config.train]}
    )
    (config.output / CONFIG_FILE).write_text(yaml.safe_dump(written.resolved(), sort_keys=False))
    _Run(config, inputs, console).carry_out(None)


def resume_fine_tuning(run: Path, console: Console) -> None:
    """Go on from a run's newest checkpoint; on a CPU the result is that of a run without a stop, bit for bit.

    Raises:
        CommandError, CheckFailed: As ``run_fine_tuning`` does; or there is nothing to go on from.
    """
    if not (run / CONFIG_FILE).is_file():
        raise CommandError(f"{run} has no {CONFIG_FILE}: give --resume the --output of an earlier lrlora finetune")
    checkpoint = checkpoints.newest(run)
    if checkpoint is None:
        raise CommandError(f"{run} has no checkpoint, so its run ended or never came to one: start a new run")
    config = read_config(run / CONFIG_FILE, {"output": run})
    _Run(config, read_inputs(config.train, config.eval_fraction), console).carry_out(checkpoint)


@dataclass(frozen=True)
class _Run:
    """One run, new or going on."""

    config: FineTuneConfig
    inputs: Inputs
    console: Console

    @property
    def plan(self) -> ArmPlan:
        """How the model is adapted."""
        config = self.config
        return ArmPlan(config.method_names, config.method_for, config.layers, config.lora_alpha, config.dropout)

    def carry_out(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one, and check on a fresh copy of the model what was saved."""
        config, device = self.config, pick_device(self.config.device)
        self.console.print(describe(device), style="bold", highlight=False)
        texts, bits = self._train_and_save(checkpoint, device)
        model, _ = load_pretrained(config.model, device, config.dtype)
        print_checks(self.console, comes_back(config.output, self.plan, config.steps, model, texts, bits))
        self.console.print(f"  {config.output}: the adapter, its ranks as text and as pictures; {peak_memory(device)}")
        self.console.print(f"  where the rank went: lrlora report {config.output}", highlight=False, soft_wrap=True)

    def _train_and_save(self, checkpoint: Path | None, device: torch.device) -> tuple[Texts, dict[str, float]]:
        """Leave the adapter, its ranks and their picture in the output directory.

        Returns:
            The texts and what they were measured at; not the model, so that there is memory for another copy of it.
        """
        config, console = self.config, self.console
        model, tokenizer = load_pretrained(config.model, device, config.dtype)
        texts = encode_inputs(self.inputs, tokenizer, model, config, console)
        files = _digest(config.train)
        state = checkpoints.read(checkpoint) if checkpoint else None
        facts: dict[str, Any] = state["facts"] if state else {"before": texts.measure(model), "files": files}
        if facts["files"] != files:
            raise CommandError(f"the files of {config.output}'s run have changed since it began: start a new run")
        arm = Arm.prepare(self.plan, Recipe(config.steps, config.lr), model, config.seed)
        trainer = arm.trainer()
        if checkpoint and state:
            checkpoints.load(checkpoint, state, arm.adapters, trainer)
        save = partial(checkpoints.save, config.output, arm.adapters, trainer, facts)

        def after_step() -> None:
            if trainer.steps % config.save_steps == 0:
                save()

        try:
            arm.train(texts, config.seed, console, config.output, facts["before"], trainer, after_step)
            arm.adapters.save(config.output)
            print_results(console, facts["before"], [arm])
            print_ranks(console, arm)
            draw_ranks([arm], config.output)
            with (config.output / "ranks.txt").open("w") as file:
                print_ranks(Console(file=file, width=200), arm)
        except ENDINGS as error:
            raise explained(error, config.output, trainer, save) from error
        checkpoints.remove(config.output)
        return texts, arm.bits


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()
