"""Small runs with their histories, for the tests of ``lrlora report``."""

import io
import json

import torch
from rich.console import Console

from lrlora_ops import DynamicRank, FixedRank, LearnedRank, SincUpdate
from lrlora_ops.finetune.arm import Arm, ArmPlan, Texts
from lrlora_ops.finetune.history import FILE
from lrlora_ops.finetune.tokens import EncodedText
from lrlora_ops.finetune.trainer import Recipe
from tests._cli import llama, qwen3_moe

STEPS, SEQ_LEN, ROWS = 12, 16, 2
LEARNED = ArmPlan("learned", lambda steps: LearnedRank(2, 6, steps, freeze=0.5, lr=0.8))
BENT = {"*.self_attn.*": SincUpdate(2, num_coefficients=3, grid=0.01), "all-linear": FixedRank(3)}
MIXED = ArmPlan("mixed", lambda _: BENT, list(BENT))  # stable ranks of attention, ranks of the rest
GROWING = ArmPlan("growing", lambda steps: DynamicRank(1, 2, 4, 10, 2, warmup=0.1, grow_fraction=0.5), "experts")


def train_run(plan, directory):
    """Train a small model as the plan says; history and adapters go to the directory."""
    generator = torch.Generator().manual_seed(0)
    stream, held_out = (torch.randint(300, (size,), generator=generator) for size in (400, 100))
    texts = Texts([(stream, ROWS)], {"near text": EncodedText(held_out, 300)}, SEQ_LEN)
    arm = Arm.prepare(plan, Recipe(STEPS, 3e-2), qwen3_moe() if plan is GROWING else llama(), seed=0)
    arm.train(texts, 0, Console(file=io.StringIO()), directory, {"near text": 3.25})
    arm.adapters.save(directory)
    return arm


def rewritten(directory, target, change):
    """A copy of a history in another directory; ``change`` gets the list of its lines, as objects."""
    lines = [json.loads(line) for line in (directory / FILE).read_text().splitlines()]
    change(lines)
    target.mkdir(parents=True, exist_ok=True)
    (target / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target
