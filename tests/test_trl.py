"""TRL's SFTTrainer on a chat file, as docs/training.md has it, and the page's other loops."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lrlora_ops import DynamicRank, LearnedRank, apply_lora

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from tests._chat import PAGE, save_chat_model, save_chats  # noqa: E402
from tests._training import Statistics, assert_same, state_of  # noqa: E402

METHODS = {
    "experts": DynamicRank(initial_rank=1, target_rank=3, max_rank=6, interval=2, warmup=0.1),
    "all-linear": LearnedRank(3, 6, lr=0.5),
}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """What the page takes for granted: a model, and a file of conversations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_chat_model(tmp_path / "model")
    save_chats(tmp_path / "chats.jsonl")


def sft(methods=METHODS, **settings):
    """A trainer with nothing but TRL's defaults and the callback."""
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    torch.manual_seed(3)
    adapters = apply_lora(model, methods)
    arguments = {"per_device_train_batch_size": 2, "max_steps": 10, "learning_rate": 5e-3, "report_to": []}
    return adapters, trl.SFTTrainer(
        model,
        trl.SFTConfig("run", use_cpu=not torch.cuda.is_available(), disable_tqdm=True, **arguments | settings),
        train_dataset=datasets.load_dataset("json", data_files="chats.jsonl", split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained("model"),
        callbacks=[adapters.callback()],
    )


def test_ranks_move_and_a_resumed_run_equals_an_uninterrupted_one():
    """With bf16 autocast and gradient checkpointing, which TRL turns on by itself; before the freeze and after it."""
    adapters, run = sft(save_strategy="steps", save_steps=3, logging_steps=1)
    assert run.args.gradient_checkpointing and run.args.bf16
    before = {name: parameter.detach().clone() for name, parameter in adapters.named_parameters()}
    run.train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in adapters.named_parameters())
    logs = [row for row in run.state.log_history if "loss" in row]
    assert logs[0]["lrlora/rank_mean/experts"] == 1 and logs[-1]["lrlora/rank_mean/experts"] == 3
    assert logs[-1]["lrlora/rank_sum"] == logs[-1]["lrlora/budget"] == 3 * (2 * 4 + 2 * 4)
    for saved_at in (3, 9):
        others, resumed = sft(logging_steps=1)
        resumed.train(resume_from_checkpoint=f"run/checkpoint-{saved_at}")
        assert_same(state_of(run.model, adapters), state_of(resumed.model, others))


def test_statistics_do_not_depend_on_how_a_batch_is_split():
    """TRL sums the tokens' losses and divides by their number in the whole batch; each part has padding of its own."""
    seen = []
    for size, accumulation in ((6, 1), (2, 3)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        adapters, run = sft(**settings, max_steps=9, bf16=False)
        for module in adapters.modules.values():
            for pool in module.pools().values():
                torch.nn.init.normal_(pool.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
        statistics = Statistics(adapters)
        run.train()
        seen.append(statistics.seen)
    for one, other in zip(seen[0][:3], seen[1][:3], strict=True):
        assert any(t.any() for t in one)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_price_per_component_needs_nothing_but_the_callback():
    """Its unit is the first loss that the trainer logs, whoever computes it."""
    adapters, run = sft(
        {"all-linear": LearnedRank(3, 6, penalty=0.1)}, max_steps=2, logging_steps=1, gradient_accumulation_steps=2
    )
    run.train()
    loss = float(adapters.policies[0].first_loss)
    assert loss == pytest.approx(run.state.log_history[0]["loss"], rel=1e-3) and adapters.policies[0].t == 2


def test_the_page_runs(capsys):
    """All blocks of docs/training.md in order; each loop trains, and moves its ranks."""
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, scope)
        adapters = scope["adapters"]
        assert all(pool.lora_B.any() for module in adapters.modules.values() for pool in module.pools().values())
        assert all(policy.frozen for policy in adapters.policies)
        assert len({int(rank) for ranks in adapters.ranks().values() for rank in ranks.flatten()}) > 1
    assert "lrlora/rank_mean" in capsys.readouterr().out
    assert Path("run/adapters/lrlora_state.json").is_file()
