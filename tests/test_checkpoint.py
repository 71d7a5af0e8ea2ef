"""Adapters.save and load: a run that goes on bit for bit, and checkpoints that are whole, or refused as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrlora_ops import FixedRank, LearnedRank, VariableRankLoRALinear, _checkpoint, apply_lora, load_adapter
from tests._models import optimize

STATE = "lrlora_state.json"
METHODS = {"up": FixedRank(3), "*": LearnedRank(3, 6, total_steps=10, lr=0.5)}


def make(method=None, *, seed: int = 0, targets="all-linear", dropout: float = 0.2, width: int = 16):
    """A small model with the same frozen weights each time, other adapters for each seed, and an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, sizes in (("down", (8, width)), ("up", (width, 12)), ("gate", (12, 12)), ("out", (12, 4))):
        model.add_module(name, nn.Linear(*sizes))
    torch.manual_seed(seed + 1)
    adapters = apply_lora(model, method or METHODS, targets, dropout=dropout)
    return model, adapters, torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0)


def train(model, adapters, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        x = torch.randn(16, 8)
        loss = (model(x) - x[:, :4].sin()).square().mean()
        losses.append(optimize(loss, adapters, optimizer))
    return losses


def snapshot(adapters) -> dict:
    """All that a checkpoint is of, and the state of training that follows from it."""
    state = {}
    for name, module in adapters.modules.items():
        state |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
        state |= {f"{name}.train_ranks": module.table.train_ranks.clone(), f"{name}.max_rank": module.max_rank}
        state[f"{name}.gate"] = module.table.gate.detach().clone()
    for index, policy in enumerate(adapters.policies):
        state |= {f"{index}.{key}": value for key, value in policy.state_dict().items()}
    return state


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


@pytest.mark.parametrize("saved_at", [0, 1, 4, 8, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, saved_at):
    """Before the first step, while ranks are learned, at the freeze (step 8) and after it; with AdamW and dropout."""
    model, adapters, optimizer = make()
    train(model, adapters, optimizer, range(saved_at))
    adapters.save(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = snapshot(adapters)
    expected = train(model, adapters, optimizer, range(saved_at, 13))

    resumed, others, optimizer = make(seed=1)
    train(resumed, others, optimizer, range(3))  # what it did before does not matter
    others.load(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert_same(snapshot(others), saved)
    assert train(resumed, others, optimizer, range(saved_at, 13)) == expected
    assert_same(snapshot(others), snapshot(adapters))
    x = torch.randn(3, 8)
    assert torch.equal(resumed.eval()(x), model.eval()(x))


def test_a_compacted_model_loads_into_one_that_is_not(tmp_path):
    """And the other way round; both go on as the saved one does."""
    model, adapters, optimizer = make()
    train(model, adapters, optimizer, range(5))
    adapters.save(tmp_path / "early")
    early = snapshot(adapters)
    train(model, adapters, optimizer, range(5, 10))
    adapters.compact(optimizer)
    train(model, adapters, optimizer, range(10, 12))
    adapters.save(tmp_path / "late")
    late = snapshot(adapters)
    assert len({module.max_rank for module in adapters.modules.values()}) > 1

    other, others, _ = make(seed=1)
    others.load(tmp_path / "late")
    assert_same(snapshot(others), late)
    x = torch.randn(3, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    others.load(tmp_path / "early")
    assert_same(snapshot(others), early)
    expected, expected_adapters, optimizer = make(seed=2)
    expected_adapters.load(tmp_path / "early")
    fresh = torch.optim.AdamW(others.parameters(), lr=1e-2, weight_decay=0)
    assert train(other.train(), others, fresh, range(5, 12)) == train(
        expected, expected_adapters, optimizer, range(5, 12)
    )


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_fixed_ranks(tmp_path, rank):
    model, adapters, optimizer = make(FixedRank(rank))
    if rank:
        train(model, adapters, optimizer, range(3))
    adapters.save(tmp_path)
    other, others, _ = make(FixedRank(rank), seed=1)
    others.load(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_into_a_model_that_moved(tmp_path, dtype):
    """The checkpoint's dtype does not matter: values are cast, ranks are not."""
    model, adapters, optimizer = make()
    train(model, adapters, optimizer, range(4))
    adapters.save(tmp_path)
    other, others, _ = make(seed=1)
    other.to(dtype)
    others.load(tmp_path)
    for name, module in others.modules.items():
        assert module.lora_A.dtype == dtype
        assert torch.equal(module.lora_A, adapters.modules[name].lora_A.to(dtype))
    assert {n: int(r) for n, r in others.ranks().items()} == {n: int(r) for n, r in adapters.ranks().items()}
    other(torch.randn(3, 8, dtype=dtype)).sum().backward()
    others.step()


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    """Those of safetensors, which are their owner's alone, too; in what is exported as well."""
    pytest.importorskip("peft")
    before = os.umask(umask)
    try:
        _, adapters, _ = make()
        adapters.save(tmp_path / "own")
        adapters.export(tmp_path / "peft")
    finally:
        os.umask(before)
    files = [path for name in ("own", "peft") for path in (tmp_path / name).iterdir()]
    assert {path.suffix for path in files} >= {".json", ".safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_a_directory_is_made_and_kept_tidy(tmp_path):
    """Saving again leaves one state and one file of tensors, and what belongs to others."""
    _, adapters, _ = make()
    directory = tmp_path / "deep" / "er"
    directory.parent.mkdir()
    adapters.save(directory)
    (directory / "notes.txt").write_text("mine")
    adapters.save(str(directory))
    names = sorted(path.name for path in directory.iterdir())
    assert names[1:] == [STATE, "notes.txt"] and names[0].startswith("lrlora_adapters-") and len(names) == 3
    assert names[0] == json.loads((directory / STATE).read_text())["tensors"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize(
    "moment", ["before the tensors", "in the tensors", "in the json", "before the rename", "after it"]
)
def test_a_save_that_dies_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    """The old one at every moment but the last; and the next save cleans up."""
    model, adapters, optimizer = make()
    adapters.save(tmp_path)
    old = snapshot(adapters)
    train(model, adapters, optimizer, range(3))
    new = snapshot(adapters)

    def die(*args, **_):
        if moment == "in the tensors":
            save_file(*args)
            os.truncate(args[1], 100)
        elif moment == "in the json":
            args[0].open("w").write('{"version": 1, "ten')
        raise Killed

    with monkeypatch.context() as patched:
        if "tensors" in moment:
            patched.setattr(_checkpoint, "save_file", die)
        elif moment == "in the json":
            patched.setattr(type(tmp_path), "write_text", die)
        elif moment == "before the rename":
            patched.setattr(type(tmp_path), "replace", die)
        else:
            patched.setattr(type(tmp_path), "unlink", die)
        with pytest.raises(Killed):
            adapters.save(tmp_path)

    _, others, _ = make(seed=1)
    others.load(tmp_path)
    assert_same(snapshot(others), new if moment == "after it" else old)
    adapters.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    others.load(tmp_path)
    assert_same(snapshot(others), new)


def edit_json(change):
    def spoil(path):
        state = json.loads((path / STATE).read_text())
        change(state)
        (path / STATE).write_text(json.dumps(state))

    return spoil


def edit_tensors(change):
    def spoil(path):
        file = path / json.loads((path / STATE).read_text())["tensors"]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return spoil


def truncate(name: str, size: int):
    def spoil(path):
        file = next(path.glob(name))
        os.truncate(file, min(size, file.stat().st_size - 1))

    return spoil


DAMAGE = {
    "json truncated": truncate(STATE, 200),
    "json empty": truncate(STATE, 0),
    "json is not text": lambda path: (path / STATE).write_bytes(b"\xff\xfe\x00\x80"),
    "json is a list": lambda path: (path / STATE).write_text("[]"),
    "no version": edit_json(lambda s: s.pop("version")),
    "a version in words": edit_json(lambda s: s.update(version="one")),
    "no file of tensors named": edit_json(lambda s: s.pop("tensors")),
    "no modules": edit_json(lambda s: s.pop("modules")),
    "modules as a list": edit_json(lambda s: s.update(modules=[])),
    "a module without max_rank": edit_json(lambda s: s["modules"]["out"].pop("max_rank")),
    "another max_rank than its tensors": edit_json(lambda s: s["modules"]["out"].update(max_rank=5)),
    "no policies": edit_json(lambda s: s.update(policies=[])),
    "a policy without its step": edit_json(lambda s: s["policies"][1].pop("t")),
    "a policy without its ranks": edit_tensors(lambda t: t.pop("policies.1.rho")),
    "a policy of other sizes": edit_tensors(lambda t: t.update({"policies.1.k": torch.zeros(2, dtype=torch.int32)})),
    "a policy with a broken generator": edit_tensors(
        lambda t: t.update({"policies.1.generator": torch.zeros(3).byte()})
    ),
    "tensors missing": lambda path: next(path.glob("*.safetensors")).unlink(),
    "tensors truncated": truncate("*.safetensors", 3000),
    "tensors empty": truncate("*.safetensors", 0),
    "a tensor missing": edit_tensors(lambda t: t.pop("out.lora_B")),
    "a table missing": edit_tensors(lambda t: t.pop("out.table.ranks")),
    "a tensor of another shape": edit_tensors(lambda t: t.update({"out.lora_B": torch.zeros(6, 5)})),
    "a rank that cannot be": edit_tensors(
        lambda t: t.update({"out.table.ranks": torch.tensor([7], dtype=torch.int32)})
    ),
    "a negative rank": edit_tensors(lambda t: t["out.table.ranks"].fill_(-1)),
    "components of another table": edit_tensors(lambda t: t["out.table.components"].fill_(3)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_whole(tmp_path, damage):
    """One ValueError, and nothing is changed."""
    model, adapters, optimizer = make()
    train(model, adapters, optimizer, range(2))
    adapters.save(tmp_path)
    damage(tmp_path)
    other, others, optimizer = make(seed=1)
    train(other, others, optimizer, range(4))
    before = snapshot(others)
    with pytest.raises(ValueError, match=r"damaged|lacks the adapter"):
        others.load(tmp_path)
    assert_same(snapshot(others), before)
    train(other, others, optimizer, range(4, 12))


OTHERS = {
    "a newer version": (
        edit_json(lambda s: s.update(version=2)),
        {},
        "format version 2, and this library reads 1; update",
    ),
    "another adapter": (None, {"targets": ["down", "up", "gate"]}, "has the adapter out; call apply_lora with the"),
    "a missing adapter": (
        edit_json(lambda s: s["modules"].pop("gate")),
        {},
        "the checkpoint lacks the adapter gate; call apply_lora",
    ),
    "another width": (None, {"width": 20}, r"up is .*\[16, 12\].*in the checkpoint and .*\[20, 12\]"),
    "another dropout": (None, {"dropout": 0.0}, "'dropout': 0.2.*in the checkpoint"),
    "another method": (None, {"method": FixedRank(6)}, "the checkpoint's methods are .*LearnedRank.*here they are"),
    "other settings": (
        None,
        {"method": METHODS | {"*": LearnedRank(2, 6, total_steps=10, lr=0.5)}},
        "'mean_rank': 3.*here they are .*'mean_rank': 2",
    ),
}


@pytest.mark.parametrize(("change", "options", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_something_else_is_refused_whole(tmp_path, change, options, message):
    _, adapters, _ = make()
    adapters.save(tmp_path)
    if change:
        change(tmp_path)
    options = dict(options)
    _, others, _ = make(options.pop("method", None), seed=1, **options)
    before = snapshot(others)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        others.load(tmp_path)
    assert_same(snapshot(others), before)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_no_checkpoint(tmp_path, name):
    (tmp_path / "file").write_text("")
    _, adapters, _ = make()
    with pytest.raises(FileNotFoundError, match=f"{name} holds no lrlora_state.json; give the directory"):
        adapters.load(tmp_path / name)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    _, adapters, _ = make()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            adapters.save(path)


def test_adopted_modules(tmp_path):
    """A model that was built with its adapters; also one whose layers hold more than the method needs."""

    def build(seed: int):
        torch.manual_seed(seed)
        model = nn.Sequential(VariableRankLoRALinear(8, 8, max_rank=9, dropout=0.1), nn.Linear(8, 4))
        return model, apply_lora(model, FixedRank(3))

    model, adapters = build(0)
    nn.init.normal_(model[0].lora_B)
    adapters.save(tmp_path)
    other, others = build(1)
    others.load(tmp_path)
    assert_same(snapshot(others) | {"0.weight": 0, "0.bias": 0}, snapshot(adapters) | {"0.weight": 0, "0.bias": 0})
    assert other[0].weight.requires_grad is False and other[1].weight.requires_grad


def plain() -> nn.Module:
    """What ``make`` adapts."""
    model, adapters, _ = make()
    for name, module in adapters.modules.items():
        setattr(model, name, module.plain(module))
    return model.requires_grad_()


@pytest.mark.parametrize("saved_at", [4, 9])
def test_a_plain_model_takes_up_the_run(tmp_path, saved_at):
    """With the methods, the scaling, the dropout and the dtype that the checkpoint has."""
    model, adapters, optimizer = make(dropout=0.3)
    for module in adapters.modules.values():
        module.scaling = 1.5
    train(model, adapters, optimizer, range(saved_at))
    adapters.save(tmp_path)
    resumed = plain()
    others = load_adapter(resumed, tmp_path)
    assert_same(snapshot(others), snapshot(adapters))
    expected = train(model, adapters, torch.optim.SGD(adapters.parameters(), lr=0.1), range(saved_at, 13))
    assert train(resumed, others, torch.optim.SGD(others.parameters(), lr=0.1), range(saved_at, 13)) == expected


def test_a_model_that_a_checkpoint_does_not_fit_stays_plain(tmp_path):
    _, adapters, _ = make()
    adapters.save(tmp_path)
    model = plain()
    with pytest.raises(ValueError, match="methods of their own; leave method out"):
        load_adapter(model, tmp_path, FixedRank(2))
    state = json.loads((tmp_path / STATE).read_text())
    changed = {**state, "modules": {k: {**v, "features": {"": [1, 2]}} for k, v in state["modules"].items()}}
    (tmp_path / STATE).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="in this model"):
        load_adapter(model, tmp_path)
    (tmp_path / STATE).write_text(json.dumps({**state, "methods": [{**state["methods"][0], "method": "Unheard"}]}))
    with pytest.raises(ValueError, match="'Unheard', which this version does not know"):
        load_adapter(model, tmp_path)
    assert all(type(layer) is nn.Linear for layer in model)
    assert all(parameter.requires_grad for parameter in model.parameters())


KILLS = """
import os, random, signal, time
import torch
from torch import nn
from lrlora_ops import LearnedRank, apply_lora

model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
adapters = apply_lora(model, LearnedRank(4, 8, total_steps=10), "all-linear")

def save(number):
    for parameter in adapters.parameters():
        parameter.data.fill_(number)
    adapters.save("checkpoint")

random.seed(0)
began = time.perf_counter()
for _ in range(10):
    save(0)
took = (time.perf_counter() - began) / 10
seen = set()
for trial in range(100):
    child = os.fork()
    if not child:
        for number in range(1000 * trial, 10**9):
            save(number)
    time.sleep(random.uniform(0, 8) * took)  # the first save may be slower
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for parameter in adapters.parameters():
        parameter.data.fill_(torch.nan)
    adapters.load("checkpoint")
    values = torch.cat([parameter.data.flatten() for parameter in adapters.parameters()]).unique()
    assert len(values) == 1 and not values.isnan().any(), values
    seen.add(values.item())
save(-1)
print(len(seen), "states,", len(os.listdir("checkpoint")), "files")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hundred_kills_at_random_moments(tmp_path):
    """After each, the checkpoint is whole: one save's tensors, all of them. A save clears what the kills left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLS]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    states, files = (int(word.split()[0]) for word in finished.stdout.split(","))
    assert states > 50, "the children were killed before they saved anything"
    assert files == 2


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, DistributedDataParallel])
def test_into_a_model_that_was_wrapped(tmp_path, wrap, one_process):
    model, adapters, optimizer = make()
    train(model, adapters, optimizer, range(3))
    adapters.save(tmp_path)
    model, others, _ = make()
    wrapped = wrap(model)
    others.load(tmp_path)
    assert_same(snapshot(others), snapshot(adapters))
    assert apply_lora(wrapped, FixedRank(3)).modules == others.modules


def test_a_compiled_model_has_the_names_of_the_model(tmp_path):
    _, adapters, _ = make()
    adapters.save(tmp_path)
    others = load_adapter(compiled(plain()), tmp_path)
    assert_same(snapshot(others), snapshot(adapters))
    new = apply_lora(compiled(plain()), FixedRank(2), "all-linear")
    assert new.modules.keys() == adapters.modules.keys()


def test_ddp_takes_no_new_adapters(tmp_path, one_process):
    _, adapters, _ = make()
    adapters.save(tmp_path)
    wrapped = DistributedDataParallel(plain())
    for adapt in (lambda: load_adapter(wrapped, tmp_path), lambda: apply_lora(wrapped, FixedRank(2), "all-linear")):
        with pytest.raises(ValueError, match="adapt the model first, then wrap it"):
            adapt()
    assert all(parameter.requires_grad for parameter in wrapped.parameters())
