"""TRL's SFTTrainer on a chat file, as docs/training.md has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lrlora_ops import DynamicRank, LearnedRank, apply_lora
from lrlora_ops.finetune.records import encode_records, read_records

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from tests._chat import TEMPLATE, save_chat_model, save_chats  # noqa: E402
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


GENERATION = TEMPLATE.replace(
    "{{ message['content'] }}<|im_end|>\n",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}",
)


def by_trl(file, tokenizer, **settings):
    """The tokens of a file's rows, those that do not count for the loss as ~token."""
    run = trl.SFTTrainer(
        "model",
        trl.SFTConfig("run", use_cpu=True, report_to=[], max_length=None, **settings),
        train_dataset=datasets.load_dataset("json", data_files=file, split="train"),
        processing_class=tokenizer,
    )
    return [
        [~token if label == -100 else token for token, label in zip(row["input_ids"], row["labels"], strict=True)]
        for row in run.train_dataset
    ]


def test_the_command_learns_from_the_tokens_that_trl_learns_from():
    """Completions, and what the assistant says, told by the template or by its parts; a cut leaves the beginning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    pairs = [{"prompt": "2 + 3 is", "completion": " 5"}, {"prompt": "é", "completion": "à, ü"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    turn = [{"role": "user", "content": "And 1 + 1?"}, {"role": "assistant", "content": "2"}]
    chats = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()[:3]]
    chats[1]["messages"] += turn
    Path("turns.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    def ours(file, seq_len=999):
        examples, cut = encode_records(tokenizer, read_records(Path(file)), seq_len)
        return [example.tolist() for example in examples.examples], examples, cut

    expected = by_trl("pairs.jsonl", tokenizer)
    rows, examples, cut = ours("pairs.jsonl")
    assert rows == expected and cut == 0
    assert examples.num_bytes == len(" 5à, ü".encode()) + 2 * len("<|im_end|>")
    rows, _, cut = ours("pairs.jsonl", 9)
    assert rows == [expected[0][:9], expected[1][:9]] and cut == 1

    by_parts, _, _ = ours("turns.jsonl")
    tokenizer.chat_template = GENERATION
    assert ours("turns.jsonl")[0] == by_trl("turns.jsonl", tokenizer, assistant_only_loss=True)
    assert by_parts == ours("turns.jsonl")[0]
    assert [sum(token >= 0 for token in row) for row in by_parts][1] > len("2<|im_end|>")


def test_a_price_per_component_needs_nothing_but_the_callback():
    """Its unit is the first loss that the trainer logs, whoever computes it."""
    adapters, run = sft(
        {"all-linear": LearnedRank(3, 6, penalty=0.1)}, max_steps=2, logging_steps=1, gradient_accumulation_steps=2
    )
    run.train()
    loss = float(adapters.policies[0].first_loss)
    assert loss == pytest.approx(run.state.log_history[0]["loss"], rel=1e-3) and adapters.policies[0].t == 2
