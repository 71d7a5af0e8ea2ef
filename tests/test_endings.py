"""Runs of lrlora finetune that end early: what they leave, what they say, and that they go on as if they had not."""

import errno
import signal

import pytest
import torch
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

from lrlora_ops import Adapters, _checkpoint
from lrlora_ops.cli import app
from lrlora_ops.finetune import own_text, trainer
from lrlora_ops.finetune.tokens import train_tokenizer
from lrlora_ops.finetune.trainer import Trainer
from tests._chat import save_chat_model, save_chats
from tests._cli import TEXT, assert_one_line, llama
from tests._training import assert_same

LEARNED = {"name": "learned", "mean_rank": 2}  # of 12 steps, compacted after the tenth
DYNAMIC = {"name": "dynamic", "initial_rank": 1, "target_rank": 2, "max_rank": 4, "interval": 2, "warmup": 0.1}
SINC = {"name": "sinc", "rank": 2, "num_coefficients": 3, "share": "type"}
ALL = {"experts": DYNAMIC, "*.o_proj": SINC, "all-linear": LEARNED}
SMALL = {"steps": 12, "batch_size": 2, "seq_len": 32, "lr": 1e-2, "device": "cpu"}
CASES = {
    "learned": {"model": "llama", "train": ["text"], "method": LEARNED, "dropout": 0.2},
    "dynamic": {"model": "chat", "train": ["chats.jsonl"], "methods": ALL, "seq_len": 128},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, a text and conversations, and a run of each case that nothing stops."""
    directory = tmp_path_factory.mktemp("home")
    llama().save_pretrained(directory / "llama")
    train_tokenizer([TEXT], 300).save_pretrained(directory / "llama")
    (directory / "text").write_text(TEXT)
    save_chat_model(directory / "chat")
    save_chats(directory / "chats.jsonl")
    for name, case in CASES.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(SMALL | case))
    return directory


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(own_text, "draw_ranks", lambda *_: [])


def run(name, output, *options):
    return invoke("finetune", "--config", f"{name}.yaml", "--output", output, *options)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def press_after(monkeypatch, steps):
    """Ctrl-C in the midst of the step before."""
    loss = trainer.batch_loss
    calls = []

    def pressed(*args):
        calls.append(None)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(trainer, "batch_loss", pressed)


@pytest.fixture(scope="module")
def uninterrupted(home, tmp_path_factory):
    """By case, what a run without a stop leaves."""
    left = {}

    def of(name):
        if name not in left:
            output = tmp_path_factory.mktemp("whole") / name
            result = run(name, output)
            assert result.exit_code == 0, (result.output, result.exception)
            left[name] = output, result.output
        return left[name]

    return of


def saved(directory):
    state, tensors = _checkpoint._read(directory)
    return state | tensors | {"tensors": None}


@pytest.mark.parametrize("name, steps", [("learned", 5), ("learned", 11), ("dynamic", 5)])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(uninterrupted, tmp_path, monkeypatch, name, steps):
    """Weights, ranks, the methods' state, and what is measured; dropout and optimizer included."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        press_after(patch, steps)
        result = run(name, output)
    words = (
        f"stopped at step {steps}; {output}/checkpoint-{steps} is saved, go on with: lrlora finetune --resume {output}$"
    )
    assert_one_line(result, words, code=130)
    resumed = invoke("finetune", "--resume", output)
    assert resumed.exit_code == 0, (resumed.output, resumed.exception)
    assert "12/12" in resumed.output
    whole, said = uninterrupted(name)
    assert_same(saved(output), saved(whole))
    assert [line for line in resumed.output.splitlines() if "held-out text" in line] == [
        line for line in said.splitlines() if "held-out text" in line
    ]
    assert not list(output.glob("*checkpoint*"))
    assert_one_line(invoke("finetune", "--resume", output), "has no checkpoint, so its run ended or never came to one")


def test_a_second_press_stops_at_once_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    step = Adapters.step

    def pressed(self, *args):
        step(self, *args)
        if self.policies[0].t == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Adapters, "step", pressed)
    before = signal.getsignal(signal.SIGINT)
    assert_one_line(run("learned", tmp_path, "--save-steps", 2), "at step 5; .*/checkpoint-4 is saved, go on", code=130)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-4"]
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_to_go_on_from(tmp_path, monkeypatch):
    """A checkpoint that is damaged, a text that is another one by now."""
    (tmp_path / "text").write_text(TEXT)
    with monkeypatch.context() as patch:
        press_after(patch, 2)
        assert run("learned", tmp_path / "run", "--train", tmp_path / "text").exit_code == 130
    (tmp_path / "text").write_text(TEXT[1:])
    assert_one_line(invoke("finetune", "--resume", tmp_path / "run"), "have changed since it began: start a new run")
    (tmp_path / "run" / "checkpoint-2" / "training.pt").write_bytes(b"PK")
    assert_one_line(invoke("finetune", "--resume", tmp_path / "run"), "checkpoint-2 is damaged .*: start a new run")


NO_SPACE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "save_steps, words",
    [
        (4, "full at step 8; .*/checkpoint-4 is saved: make room, then go on with: lrlora finetune --resume"),
        (100, "full at step 12; nothing is saved: make room, then start anew with another --output"),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, save_steps, words):
    """After the first checkpoint, or when the adapter is written at the end: no half of anything is left."""
    save_file, calls = _checkpoint.save_file, []

    def full(tensors, path, *args):
        calls.append(path)
        if len(calls) > 4 // save_steps:
            path.write_bytes(b"as far as it went")
            raise NO_SPACE
        save_file(tensors, path, *args)

    monkeypatch.setattr(_checkpoint, "save_file", full)
    assert_one_line(run("learned", tmp_path, "--save-steps", save_steps), words, code=3)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "history.jsonl"} | (
        {"checkpoint-4"} if save_steps == 4 else set()
    )


@pytest.mark.parametrize(
    "words, error, code",
    [
        ("is full at step 3; nothing is saved: make room, then start anew", NO_SPACE, 3),
        (
            r"cannot be written \(.*Permission denied.*\); nothing is saved: put that right, then start anew",
            SafetensorError("I/O error: Permission denied (os error 13)"),
            2,
        ),
    ],
)
def test_a_disk_that_takes_nothing_at_ctrl_c(tmp_path, monkeypatch, words, error, code):
    def refuse(*_):
        raise error

    monkeypatch.setattr(_checkpoint, "save_file", refuse)
    press_after(monkeypatch, 3)
    assert_one_line(run("learned", tmp_path), words, code)


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "config.yaml")

    monkeypatch.setattr(own_text.yaml, "safe_dump", full)
    assert_one_line(run("learned", tmp_path), r"disk is full \(.*config.yaml.*\): make room, or choose another", code=3)


def test_out_of_memory(tmp_path, monkeypatch):
    """The state of the last whole step is saved."""
    loss, calls = trainer.batch_loss, []

    def greedy(*args):
        calls.append(None)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*args)

    monkeypatch.setattr(trainer, "batch_loss", greedy)
    words = (
        "memory is full at step 4; .*/checkpoint-4 is saved: go on .* --resume .*, or start anew with a lower --batch"
    )
    assert_one_line(run("learned", tmp_path), words, code=5)
    assert torch.load(tmp_path / "checkpoint-4" / "training.pt")["trainer"]["steps"] == 4


def test_out_of_memory_before_the_first_step(tmp_path, monkeypatch):
    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(own_text, "load_pretrained", greedy)
    assert_one_line(run("learned", tmp_path), "memory is full; nothing is saved: lower --batch-size", code=5)


def test_a_loss_that_is_not_finite(tmp_path):
    words = r"the loss is (nan|inf) at step \d+: lower the learning rate, 1e\+30, .* --lr; .*checkpoint-\d is saved"
    assert_one_line(run("learned", tmp_path, "--lr", "1e30", "--save-steps", 1), words, code=4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(where):
    model = llama()
    made = Trainer(model, trainer.Recipe(3, 1e-2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    hook = (lambda g: g * torch.inf) if where == "gradient" else None
    if hook:
        model.lm_head.weight.register_hook(hook)
    else:
        torch.nn.init.constant_(model.model.norm.weight, torch.inf)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(trainer.Diverged, match=f"the .*{where} is (nan|inf) at step 0: lower the learning rate, 0.01"):
        made.step(torch.arange(12).view(2, 6))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert made.whole and made.steps == 0
