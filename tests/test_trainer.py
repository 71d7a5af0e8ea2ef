"""Inside Hugging Face's Trainer: when the ranks move, what they are moved by, and that a run can be resumed."""

from __future__ import annotations

import shutil

import pytest
import torch

from lrlora_ops import DynamicRank, apply_lora

transformers = pytest.importorskip("transformers")
from tests._moe import tiny  # noqa: E402
from tests._training import (  # noqa: E402
    CASES,
    LEARNED,
    STEPS,
    Statistics,
    Text,
    adapted,
    assert_same,
    llama,
    priced,
    state_of,
    trainer,
)


class Moments(transformers.TrainerCallback):
    """How often the adapters had been stepped, and their ranks, at the end of each optimizer step."""

    def __init__(self, adapters) -> None:
        self.adapters, self.steps, self.ranks = adapters, [], []
        self.called = 0
        step = adapters.step
        adapters.step = lambda **options: (self.count(), step(**options))

    def count(self) -> None:
        self.called += 1

    def on_step_end(self, *_, **__) -> None:
        self.steps.append(self.called)
        self.ranks.append(sum(int(ranks.sum()) for ranks in self.adapters.ranks().values()))


@pytest.mark.parametrize(
    "settings, total",
    [
        ({}, STEPS),
        ({"gradient_accumulation_steps": 3}, STEPS),
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 5}, 6),  # 12 batches: 5, 5 and 2
    ],
    ids=["batches", "accumulated", "epochs"],
)
def test_one_step_per_optimizer_step(tmp_path, settings, total):
    """With the trainer's length of the run; the ranks meet the budget and stay."""
    model = llama()
    adapters = apply_lora(model, LEARNED, "all-linear")
    moments = Moments(adapters)
    trainer(model, adapters, tmp_path, [moments], **settings).train()
    (policy,) = adapters.policies
    assert moments.steps == list(range(1, total + 1))
    assert (policy.total_steps, policy.t, policy.frozen) == (total, -(-total * 4 // 5), True)
    ranks = [int(rank) for rank in adapters.ranks().values()]
    assert sum(ranks) == 3 * len(ranks) and len(set(ranks)) > 1
    assert not list(tmp_path.glob("**/lrlora*"))


@pytest.mark.parametrize("case", ["learned", "grown experts, learned layers"])
def test_statistics_do_not_depend_on_how_a_batch_is_split(tmp_path, case):
    """Micro-batches have different numbers of tokens that count: the trainer weighs them, and autograd adds up."""
    seen = []
    for size, accumulation in ((6, 1), (2, 3)):
        model, adapters = adapted(case)
        statistics = Statistics(adapters)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 9}
        trainer(model, adapters, tmp_path, **settings).train()
        seen.append(statistics.seen)
    assert len(seen[0]) == len(seen[1]) == 9
    for step, (one, other) in enumerate(zip(seen[0][:3], seen[1][:3], strict=True)):  # rounding grows from step to step
        assert not step or any(t.any() for t in one)  # at first b = 0, and c with it
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", ["functions of a kind", "grown experts, learned layers"])
def test_gradient_checkpointing_changes_no_bit(tmp_path, case, use_reentrant):
    """Of weights, ranks and what the methods remember."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    states = []
    for settings in ({}, checkpointing):
        model, adapters = adapted(case)
        trainer(model, adapters, tmp_path, **settings).train()
        states.append(state_of(model, adapters))
    assert_same(*states)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, case):
    """Bit for bit: weights, ranks and the methods' states, from before the freeze and from after it."""

    def start():
        model, adapters = adapted(case, dropout=0.1 if case in ("fixed", "learned") else 0.0)
        return model, adapters, trainer(model, adapters, tmp_path, save_strategy="steps", save_steps=3)

    model, adapters, run = start()
    run.train()
    assert all(policy.frozen for policy in adapters.policies)
    for saved_at in (3, 9):
        resumed, others, run = start()
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
        assert_same(state_of(model, adapters), state_of(resumed, others))


def test_a_checkpoint_may_have_moved(tmp_path):
    """The state comes from where the weights come from, not from a checkpoint of that name in the output folder."""
    model, adapters = adapted("learned")
    trainer(model, adapters, tmp_path / "run", save_strategy="steps", save_steps=4).train()
    shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "moved" / "best")
    shutil.copytree(tmp_path / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-4")
    resumed, others = adapted("learned")
    run = trainer(resumed, others, tmp_path / "run")
    run.train(resume_from_checkpoint=str(tmp_path / "moved" / "best"))
    assert_same(state_of(model, adapters), state_of(resumed, others))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    """Ranks and the methods' state with the weights."""
    model, adapters = adapted("grown experts, learned layers")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    run = trainer(model, adapters, tmp_path, **best, **steps)  # the worst, in truth: the first one
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    loaded, others = adapted("grown experts, learned layers")
    others.load(tmp_path / "checkpoint-3")
    assert_same(state_of(model, adapters), state_of(loaded, others))
    assert adapters.metrics()["lrlora/rank_mean/experts"] < 3


def test_a_resumed_run_may_have_another_length(tmp_path):
    """The trainer tells it, unless the method was told."""
    model, adapters = adapted("learned")
    trainer(model, adapters, tmp_path, save_strategy="steps", save_steps=4).train()
    resumed, others = adapted("learned")
    trainer(resumed, others, tmp_path, max_steps=20).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (policy,) = others.policies
    assert (policy.total_steps, policy.t, policy.frozen) == (20, 16, True)


def test_resuming_without_the_methods_state_is_an_error(tmp_path):
    """The trainer's own files would start the method anew in the middle of the run."""
    model, adapters = adapted("learned")
    trainer(model, adapters, tmp_path, save_strategy="steps", save_steps=5).train()
    (tmp_path / "checkpoint-5" / "lrlora_state.json").unlink()
    model, adapters = adapted("learned")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-5 holds no lrlora_state.json"):
        trainer(model, adapters, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def scaled(run, **settings):
    """The trainer as in fp16 on a GPU: accelerate scales the loss, and may skip the optimizer's step."""
    run.accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
    return run


def test_the_loss_scale_changes_no_bit(tmp_path):
    """Also not when it doubles in the middle: with a power of two, the run is the run without it."""
    states = []
    for scale in (None, 2.0**20):
        model, adapters = adapted("grown experts, learned layers")
        run = trainer(model, adapters, tmp_path, max_grad_norm=0)
        if scale:
            scaled(run, init_scale=scale, growth_interval=3)
        run.train()
        states.append(state_of(model, adapters))
    assert run.accelerator.scaler.get_scale() == 2.0**23
    assert_same(*states)


class Overflow(transformers.TrainerCallback):
    """In the first step."""

    def __init__(self, adapters) -> None:
        self.adapters = adapters

    def on_pre_optimizer_step(self, _, state, *__, **___) -> None:
        if not state.global_step:
            for leaf in (*self.adapters.parameters(), *(table.gate for table in self.adapters.tables.values())):
                leaf.grad.fill_(torch.inf)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_does_not_count(tmp_path, optim):
    """The gradients of the first step overflow: nothing grows, nothing is remembered of it, the next step grows."""
    model = tiny("qwen3_moe")
    method = DynamicRank(initial_rank=1, target_rank=3, max_rank=6, interval=2, warmup=0)
    adapters = apply_lora(model, method, "experts")
    moments, statistics = Moments(adapters), Statistics(adapters)
    scaled(trainer(model, adapters, tmp_path, [moments, Overflow(adapters)], max_grad_norm=0, optim=optim)).train()
    assert moments.ranks[:3] == [8, moments.ranks[1], moments.ranks[1]] and moments.ranks[1] > 8
    assert moments.ranks[-1] == 2 * 4 * 3
    assert len(statistics.seen) == STEPS - 1 and all(t.isfinite().all() for step in statistics.seen for t in step)


def test_clipping_is_no_business_of_the_methods(tmp_path):
    """They see the gradient of the loss, whatever is left of it for the optimizer."""
    seen = []
    for max_grad_norm in (0, 1e-4):
        model, adapters = adapted("learned")
        torch.manual_seed(1)
        for parameter in adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        statistics = Statistics(adapters)
        trainer(model, adapters, tmp_path, max_steps=1, max_grad_norm=max_grad_norm).train()
        seen.append(statistics.seen)
    assert any(t.any() for t in seen[0][0])
    for one, other in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(one, other)


def by_hand(max_grad_norm):
    """A loop of one's own that gives ``step`` the loss, whose unit the price has; each step has all rows."""
    model, adapters = priced()
    data = [Text()[index] for index in range(len(Text()))]
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "labels")}
    adapters.policies[0].total_steps = STEPS
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3, weight_decay=0)
    model.train()
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(adapters.parameters(), max_grad_norm)
        adapters.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return adapters.policies[0]


@pytest.mark.parametrize("size, accumulation, scale", [(24, 1, None), (6, 4, None), (6, 4, 2.0**20)])
def test_a_price_per_component_needs_nothing_but_the_callback(tmp_path, size, accumulation, scale):
    """Its unit is the first step's loss, whatever the micro-batches, the clipping and the loss scale."""
    max_grad_norm = 0 if scale else 0.5  # accelerate unscales before it clips in fp16 alone
    expected = by_hand(max_grad_norm)
    model, adapters = priced()
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    run = trainer(model, adapters, tmp_path, **settings)
    if scale:
        scaled(run, init_scale=scale)
    run.train()
    (policy,) = adapters.policies
    torch.testing.assert_close(policy.first_loss, expected.first_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(policy.rho, expected.rho, rtol=1e-3, atol=1e-3)
    assert policy.rho.sum() != pytest.approx(3 * policy.groups, abs=1), "the price must tell"
    assert run.training_step.__func__ is transformers.Trainer.training_step


def test_a_skipped_step_has_no_part_in_the_unit(tmp_path):
    model, adapters = priced()
    settings = {"per_device_train_batch_size": 24, "max_grad_norm": 0, "max_steps": 2}
    scaled(trainer(model, adapters, tmp_path, [Overflow(adapters)], **settings)).train()
    (policy,) = adapters.policies
    torch.testing.assert_close(policy.first_loss, by_hand(0).first_loss, rtol=1e-5, atol=0)


def test_before_the_optimizer_or_after_it_is_one():
    """``step`` writes no parameter, and an optimizer reads no rank."""
    states = []
    for after in (False, True):
        model, adapters = adapted("grown experts, learned layers")
        for policy in adapters.policies:
            policy.total_steps = STEPS
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3, weight_decay=0)
        row = Text()[0]["input_ids"][None]
        for _ in range(STEPS):
            model.train()(input_ids=row, labels=row).loss.backward()
            for step in (optimizer.step, adapters.step) if after else (adapters.step, optimizer.step):
                step()
            optimizer.zero_grad()
        states.append(state_of(model, adapters))
    assert_same(*states)
