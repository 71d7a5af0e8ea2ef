"""Every refusal of the public API and of the command: the input, the error, what it says, and the fix that it names."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
from typer.testing import CliRunner

from lrlora_ops import FixedRank, LearnedRank, apply_lora
from lrlora_ops.cli import app
from lrlora_ops.finetune.tokens import train_tokenizer
from tests._api_errors import OTHER_ERRORS, ROWS
from tests._cli import TEXT, assert_one_line, gpt2_without_linear_layers, llama


@pytest.mark.parametrize(("call", "said", "fix"), ROWS, ids=[f"{said[:40]}-{i}" for i, (_, said, _) in enumerate(ROWS)])
def test_api(call, said, fix):
    error = next((error for words, error in OTHER_ERRORS.items() if words in said), ValueError)
    with pytest.raises(error, match=f"(?s){said}.*{fix}") as raised:
        call()
    assert type(raised.value) is error


CHAT = {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
PAIR = {"prompt": "2 + 3 is ", "completion": "5"}


def lines(*records):
    return "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)


FILES = {
    "text": TEXT,
    "empty": " \n",
    "short": "a few words\n",
    "binary": "text\0text",
    "not-json.jsonl": lines({"text": "a"}, "{oops"),
    "list.jsonl": lines("[1]"),
    "typo.jsonl": lines({"prompt": "a", "completon": "b"}),
    "none.jsonl": lines({"question": "a"}),
    "no-completion.jsonl": lines({"prompt": "a", "completion": ""}),
    "number.jsonl": lines({"text": 3}),
    "mixed.jsonl": lines(PAIR, CHAT),
    "no-assistant.jsonl": lines({"messages": CHAT["messages"][:1]}),
    "no-role.jsonl": lines({"messages": [{"content": "5"}]}),
    "chats.jsonl": lines(CHAT, CHAT),
    "pairs.jsonl": lines(*[PAIR] * 5),
    "one.jsonl": lines(PAIR),
    "typo.yaml": "model: llama\ntrain: [text]\nstep: 3\n",
    "unknown.yaml": "model: llama\ntrain: [text]\nabacus: 3\n",
    "top-level.yaml": "model: llama\nmean_rank: 3\ntrain: [text]\n",
    "nested.yaml": "model: llama\ntrain: [text]\nmethod:\n  name: dynamic\n  intervall: 3\n",
    "other-s.yaml": "model: llama\ntrain: [text]\nmethod:\n  name: learned\n  interval: 3\n",
    "method.yaml": "model: llama\ntrain: [text]\nmethod:\n  name: lerned\n",
    "no-name.yaml": "model: llama\ntrain: [text]\nmethod:\n  mean_rank: 3\n  other: 4\n",
    "word.yaml": "model: llama\ntrain: [text]\nmethod: learned\n",
    "many.yaml": "model: llama\ntrain: [text]\nsteps: many\n",
    "zero.yaml": "model: llama\ntrain: [text]\nsteps: 0\nlr: 0\n",
    "tau.yaml": "model: llama\ntrain: [text]\nmethod:\n  name: learned\n  tau: [1, 0]\n",
    "wide.yaml": "model: llama\ntrain: [text]\nmethod:\n  name: learned\n  tau: wide\n",
    "both.yaml": "model: llama\ntrain: [text]\ntargets: [a]\nmethods:\n  q_proj:\n    name: fixed\n",
    "in-methods.yaml": "model: llama\ntrain: [text]\nmethods:\n  q_proj:\n    name: fixed\n    rnak: 3\n",
    "one-of-methods.yaml": "model: llama\ntrain: [text]\nmethods:\n  q_proj:\n    name: fxed\n",
    "value-of-methods.yaml": "model: llama\ntrain: [text]\nmethods:\n  q_proj:\n    name: fixed\n    rank: -3\n",
    "string.yaml": "model: llama\ntrain: text\n",
    "no-train.yaml": "model: llama\n",
    "twice.yaml": "model: llama\ntrain: [text]\nsteps: 3\nsteps: 4\n",
    "broken.yaml": "model: llama\ntrain: [text\n",
    "list.yaml": "- model\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, adapters and files, good and bad."""
    directory = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer([TEXT], 300)
    for name, model in (("llama", llama()), ("gpt2", gpt2_without_linear_layers()), ("half", llama().half())):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    for name in ("damaged", "vision", "odd-chat"):
        shutil.copytree(directory / "llama", directory / name)
    (directory / "damaged" / "model.safetensors").write_bytes(b"not a tensor file")
    (directory / "vision" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory / "odd-chat")
    (directory / "no-model").mkdir()
    (directory / "latin-1").write_bytes("Größe".encode("latin-1"))
    (directory / "occupied").mkdir()
    (directory / "occupied" / "thesis").write_text("do not touch")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    apply_lora(llama(), LearnedRank(2, 4), "q_proj").save(directory / "run")
    other = llama()
    apply_lora(other.model, FixedRank(2), "layers.1.*").save(directory / "other-run")
    return directory


def finetune(*options, model="llama", train="text"):
    small = "--device cpu --seq-len 16 --steps 2 --batch-size 2"
    return " ".join(["finetune", "--model", model, "--train", train, "--output {new}", small, *options])


def config(name):
    return f"finetune --config {name}.yaml --output {{new}}"


COMMANDS = [
    (finetune(model="nowhere"), "nowhere is no directory", "give one that holds a Hugging Face model"),
    (finetune(model="text"), "text is no directory", "give one that holds a Hugging Face model"),
    (finetune(model="no-model"), r"no-model has no config\.json", "give a directory that save_pretrained wrote"),
    (finetune(model="damaged"), "damaged cannot be loaded as a causal language model", "give another --model"),
    (finetune(model="vision"), "vision cannot be loaded as a causal language model", "give another --model"),
    (finetune(model="gpt2"), "'all-linear' matches no linear layer", "the linear layers are"),
    (finetune(model="half"), "the model is in float16", "add --dtype bfloat16"),
    (finetune(train="nowhere"), r"nowhere cannot be read \(No such file", "give a text file with --train"),
    (finetune(train="occupied"), r"occupied cannot be read \(Is a directory\)", "give a text file with --train"),
    (finetune(train="empty"), "empty is empty", "leave it out, or put text into it"),
    (finetune(train="binary"), "binary is a binary file", "give a text file"),
    (finetune(train="latin-1"), "latin-1 is not UTF-8 text", "convert it, or leave it out"),
    (finetune(train="short"), "the text is too short: 11 tokens", "add text, or lower --seq-len"),
    (
        finetune(train="not-json.jsonl"),
        r"not-json.jsonl, line 2 is not JSON \(Expecting",
        "must be an object with 'text'",
    ),
    (finetune(train="list.jsonl"), "list.jsonl, line 1 is a list", "it must be an object with 'text'"),
    (finetune(train="typo.jsonl"), "line 1 has 'prompt', 'completon'", "did you mean 'completion' by 'completon'"),
    (
        finetune(train="none.jsonl"),
        "line 1 has 'question'",
        "it must have 'text', or 'prompt' and 'completion', or 'mess",
    ),
    (finetune(train="no-completion.jsonl"), "line 1: completion is ''", "it must be text that is not empty"),
    (finetune(train="number.jsonl"), "line 1: text is 3", "it must be text that is not empty"),
    (
        finetune(train="mixed.jsonl"),
        "line 2 has messages, the lines before it prompt and",
        "each kind into a file of its own",
    ),
    (finetune(train="no-assistant.jsonl"), "line 1: no message has the role 'assistant'", "leave it out"),
    (finetune(train="no-role.jsonl"), "line 1: messages", "must be a list of objects with 'role' and 'content'"),
    (
        finetune(train="chats.jsonl"),
        "has messages, but the model's tokenizer has no chat template",
        "choose a chat model",
    ),
    (
        finetune(model="odd-chat", train="chats.jsonl"),
        "changes what came before message 1",
        "put {% generation %} around it",
    ),
    (finetune("pairs.jsonl"), r"both text and prompt and completion \(pairs.jsonl, line 1\)", "train on one of them"),
    (finetune(train="one.jsonl"), "of 1 examples 0 are left to train on", "add examples, or raise --seq-len"),
    (finetune("--seq-len 3", train="pairs.jsonl"), "of 5 examples 0 are left to train on", "raise --seq-len, 3"),
    (finetune("--output occupied"), "occupied is not empty", "choose another --output, or empty it"),
    (finetune("--output text/new"), r"text/new cannot be written \(Not a directory\)", "choose another --output"),
    (finetune("--mean-rank -1"), "--mean-rank is -1.0", "it must be a number of at least 0"),
    (finetune("--mean-rank nan"), "--mean-rank is nan", "it must be a number of at least 0"),
    (finetune("--mean-rank 2 --max-rank 1"), "--max-rank is 1", "it must be at least mean_rank, 2"),
    (finetune("--tau 1 0"), r"--tau is \(1.0, 0.0\)", "it must be two positive numbers"),
    (finetune("--method-lr 0"), "--method-lr is 0.0", "it must be a positive number, or None"),
    (finetune("--method fixed --rank -1"), "--rank is -1", "it must be an integer of at least 0"),
    (finetune("--method fixed --max-rank 8"), "--max-rank is no setting of the method fixed", "this method has rank"),
    (finetune("--method dynamic --score x"), "--score is 'x'", 'it must be "paper" or "saliency"'),
    (finetune("--method dynamic --targets q_proj"), "a run of 2 steps has no growth", "lower interval or warmup"),
    (finetune("--targets no_such_proj"), "'no_such_proj' matches no linear layer", "the linear layers are .*q_proj"),
    (finetune("--steps 0"), "--steps is 0", "it must be greater than or equal to 1"),
    (finetune("--batch-size -3"), "--batch-size is -3", "it must be greater than or equal to 1"),
    (finetune("--seq-len 1"), "--seq-len is 1", "it must be greater than or equal to 2"),
    (finetune("--seq-len 65"), "--seq-len is 65, but the model reads at most 64 tokens", "lower it"),
    (finetune("--lr nan"), "--lr is nan", "it must be a finite number"),
    (finetune("--eval-fraction 1"), "--eval-fraction is 1.0", "it must be less than 1"),
    (finetune("--dropout 1"), "--dropout is 1.0", "it must be less than 1"),
    (finetune("--device abacus"), "--device abacus is not usable here", "choose auto or one of: cpu"),
    (config("nowhere"), r"nowhere.yaml cannot be read \(No such file", "give a text file with --config"),
    (config("typo"), "typo.yaml, line 3: step is no setting", "did you mean steps"),
    (config("unknown"), "unknown.yaml, line 3: abacus is no setting; there are", "targets.*steps"),
    (config("top-level"), "top-level.yaml, line 2: mean_rank is no setting", "it belongs under 'method:'"),
    (config("nested"), "line 5: method.intervall is no setting of the method dynamic", "did you mean interval"),
    (config("other-s"), "line 5: method.interval is no setting of the method learned", "it is one of dynamic"),
    (
        config("method"),
        "method.yaml, line 4: method.name is 'lerned'",
        "fixed, learned, dynamic, sinc; did you mean learned",
    ),
    (config("no-name"), "no-name.yaml, line 3: method has no name", "add 'name:' with one of fixed, learned, dynamic"),
    (config("word"), "word.yaml, line 3: method is 'learned'", "it must be a valid dictionary"),
    (config("many"), "many.yaml, line 3: steps is 'many'", r"it must be a valid integer$"),
    (config("zero"), "line 3: steps is 0", r"greater than or equal to 1 \(1 more mistake after it\)"),
    (config("tau"), r"tau.yaml, line 5: method.tau is \(1.0, 0.0\)", "it must be two positive numbers"),
    (config("wide"), "wide.yaml, line 5: method.tau is 'wide'", "it must be a valid tuple"),
    (config("both"), "both.yaml, line 4: methods is given beside method or targets", "leave out the one or the other"),
    (config("in-methods"), "line 6: methods.q_proj.rnak is no setting of the method fixed", "did you mean rank"),
    (config("one-of-methods"), "line 5: methods.q_proj.name is 'fxed'", "did you mean fixed"),
    (config("value-of-methods"), "line 6: methods.q_proj.rank is -3", "it must be an integer of at least 0"),
    (config("in-methods") + " --mean-rank 3", "methods.q_proj.rnak is no setting", "did you mean rank"),
    (config("string"), "string.yaml, line 2: train is 'text'", "it must be a valid list"),
    (config("no-train"), "train is missing", "add --train, or 'train:' to the file of --config"),
    (config("no-train") + " --steps 0 --train text", "--steps is 0", "it must be greater than or equal to 1"),
    (config("twice"), "twice.yaml, line 4: steps is there twice", "leave one of them out"),
    (config("broken"), "broken.yaml, line 3: not YAML", "put it right"),
    (config("list"), "list.yaml is a list", "it must be a list of lines such as 'steps: 300'"),
    (
        "finetune --resume no-model",
        "no-model has no config.yaml",
        "give --resume the --output of an earlier lrlora finetune",
    ),
    ("finetune --resume run --lr 1 --steps 3", "goes on with the run's own settings", "leave out --steps, --lr"),
    ("finetune --resume run --config typo.yaml", "goes on with the run's own settings", "leave out --config"),
    ("finetune --model llama extra", "extra comes after no option", "put --train before it"),
    ("finetune --mean-rank abc", "Invalid value for '--mean-rank'", r"\(see lrlora finetune --help\)"),
    ("finetune --method abacus", "Invalid value for '--method'.*learned", r"\(see lrlora finetune --help\)"),
    ("finetune --stpes 3", "No such option.*--stpes", r"--steps.*\(see lrlora finetune --help\)"),
    ("finetune --model", "'--model' requires an argument", r"\(see lrlora --help\)"),  # told before any command
    ("demo --seeds 1.5", "Invalid value for '--seeds'", r"\(see lrlora demo --help\)"),
    ("demo --seeds 1 2.5", "Invalid value for '--seeds'.*2.5", r"\(see lrlora demo --help\)"),
    ("demo --seeds 1 2 1", "--seeds has 1, 2, 1", "leave out what is there twice"),
    ("demo extra", "unexpected extra argument.*extra", r"\(see lrlora demo --help\)"),
    ("demo --minutes 0", "--minutes is 0.0", "it must be above 0"),
    ("--rank 8", "No such option.*--rank", r"\(see lrlora --help\)"),
    ("dmo", "No such command 'dmo'", r"\(see lrlora --help\)"),
    (
        "export --model llama --adapter run --output occupied",
        "occupied exists and is not an empty directory",
        "a new one",
    ),
    (
        "export --model llama --adapter no-model --output {new}",
        "no-model holds no adapter_config.json",
        "give the directory",
    ),
    (
        "export --model llama --adapter other-run --output {new}",
        "of the checkpoint is model.layers",
        "the model that was saved",
    ),
    (
        "export --model llama --adapter run --format gguf",
        "Invalid value for '--format'.*peft",
        r"\(see lrlora export --help\)",
    ),
    ("doctor nowhere --device cpu", "nowhere is no directory", "give one that holds a Hugging Face model"),
    ("doctor run --device cpu", "run holds adapters", "add --model DIRECTORY"),
    ("doctor llama --model llama --device cpu", "llama holds no adapters, which --model is for", "leave --model out"),
    (
        "doctor run --model llama --targets q_proj --device cpu",
        "run holds adapters, whose targets are settled",
        "--targets out",
    ),
    ("doctor llama --targets abacus --device cpu", "'abacus' matches no linear layer", "the linear layers are"),
    ("doctor llama --method dynamic --device cpu", "target 'experts' matches nothing", "or name linear layers"),
    ("plan no-model --budget 8", r"no-model has no config\.json", "give the directory of a Hugging Face model"),
    ("plan vision --budget 8", "vision cannot be planned as a causal language model", "give another MODEL"),
    ("plan llama --budget 0", "--budget is 0.0", "it must be above 0"),
    ("plan llama --budget nan", "--budget is nan", "it must be above 0"),
    ("plan llama --budget 8 --max-rank 4", "--max-rank is 4", "it must be at least the budget, 8"),
    ("plan llama --budget 8 --tokens 1", "--tokens is 1", "it must be at least 2"),
    ("plan llama --budget 8 --gpu-memory -1", "--gpu-memory is -1.0", "it must be above 0"),
    ("plan llama --budget 8 --gpu abacus", "--gpu is abacus", "it must be one of GB200, B200"),
    (
        "plan llama --budget 8 --targets abacus",
        "cannot be planned.*'abacus' matches no linear layer",
        "linear layers are",
    ),
    ("plan llama --budget 8 --gpu 'H100 MIG 1g.10gb'", "--gpu is H100 MIG 1g.10gb", "it must be one of GB200, B200"),
    ("report nowhere", "nowhere is no directory", "give the --output of lrlora finetune or demo, or the output dir"),
    ("report no-model", r"no-model is no run: it holds no history\.jsonl", "give the --output of lrlora finetune"),
    ("report run", r"run holds adapters, but no history\.jsonl", "give .*, or see the adapters with lrlora doctor"),
    ("report", r"Missing argument 'RUN\.\.\.'", r"\(see lrlora report --help\)"),
    ("tune llama --rank 0", "--rank is 0", "it must be at least 1"),
    ("tune llama --tokens 1", "--tokens is 1", "it must be at least 2"),
    (
        "bench --shape 8,8",
        "--shape is '8,8'",
        "it must be M,K,N: rows, inputs and outputs of a linear layer",
    ),
    ("bench --shape 8,0,8", "--shape is '8,0,8'", "it must be M,K,N"),
    ("bench --experts 1,2,3", "--experts is '1,2,3'", "it must be T,E,k,hidden,intermediate: tokens, experts"),
    ("bench --experts 8,2,3,4,4", "3 experts of a token are more than 2", ""),
    ("bench --rank 8", "--rank, --dtype and --device are for layers", "name a MODEL, --shape or --experts"),
    ("bench --shape 8,8,8 --rank 0", "--rank is 0", "it must be at least 1"),
    ("bench --shape 8,8,8 --tokens 9", "--tokens and --targets are for a MODEL", "name its directory"),
    ("bench --shape 8,8,8 --tokens 1", "--tokens is 1", "it must be at least 2"),
    ("bench --shape 8,8,8 --table", "--table does not go with layers", "leave it out, or MODEL, --shape and"),
    ("bench --shape 8,8,8 -x", "-x, which goes to pytest, does not go with layers", "leave it out"),
    ("bench here there", "there, which goes to pytest, does not go with layers", "leave it out"),
    ("bench nowhere", r"nowhere has no config\.json", "give the directory of a Hugging Face model"),
    ("bench --shape 8,8,8 --device abacus", "--device abacus is not usable here", "choose auto or one of: cpu"),
]


@pytest.mark.parametrize(
    ("words", "said", "fix"), COMMANDS, ids=[words.replace("{new}", "new") for words, *_ in COMMANDS]
)
def test_command(home, tmp_path, monkeypatch, words, said, fix):
    """One line, exit code 2, nothing else touched."""
    monkeypatch.chdir(home)
    result = CliRunner().invoke(app, shlex.split(words.format(new=tmp_path / "new")))
    assert_one_line(result, f"{said}.*{fix}")
    assert (home / "occupied" / "thesis").read_text() == "do not touch"
