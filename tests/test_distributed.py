"""Several processes, each with its share of the batch, do what one process does with all of it: DDP and FSDP2."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lrlora_ops import Adapters, DynamicRank, LearnedRank, apply_lora, load_adapter

transformers = pytest.importorskip("transformers")
from tests._training import priced, trainer  # noqa: E402

pytestmark = pytest.mark.slow  # ten processes that import everything

STEPS, HALF, EXPERTS = 12, 6, 6
METHODS = {
    "experts": DynamicRank(2, 4, 8, total_steps=STEPS, interval=2, warmup=0.0),
    "all-linear": LearnedRank(mean_rank=4, max_rank=8, total_steps=STEPS),
}


def make_model():
    """6 experts: 4 processes hold 2, 2, 2 and none of them."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.3,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def wrap(model, how):
    """The model that is called, ready for training in this process group."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how.startswith("fsdp"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if how == "fsdp bf16" else None)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def as_launched(share, of):
    """The environment that a launcher gives a process, for libraries that ask for it though the group is there."""
    os.environ.update(RANK=str(share), LOCAL_RANK=str(share), WORLD_SIZE=str(of), LOCAL_WORLD_SIZE=str(of))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29611")


def prepared_by_accelerate(model, optimizer, share, of):
    """With its FSDP2 plugin, turned on as it would be if the processes had accelerators: on CPUs it is ignored."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    as_launched(share, of)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3MoeDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU, "the plugin runs on CPUs by now: say so in docs/"
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator.prepare(model, optimizer)


def batch(step, share, of):
    """One sequence for each of 4 processes; few tokens, so that experts go without."""
    rows = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(step))
    return rows.tensor_split(of)[share]


@dataclass
class Run:
    """A model in training, in one of ``of`` processes."""

    how: str
    share: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        model = make_model()
        self.adapters = apply_lora(model, METHODS)
        self.model = wrap(model, self.how)
        self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=1e-2, weight_decay=0)
        if self.how == "accelerate":
            self.model, self.optimizer = prepared_by_accelerate(self.model, self.optimizer, self.share, self.of)
            assert all(hasattr(parameter, "full_tensor") for parameter in self.adapters.parameters())
        self.idle = 0  # how often an expert had no row in this process

    def train(self, steps):
        """The loss of all processes, all ranks, and what is live in the next step, after each step."""
        history = []
        for step in steps:
            rows = batch(step, self.share, self.of)
            loss = self.model(rows, labels=rows).loss
            loss.backward()
            self.idle += sum(int((t.row_counts == 0).sum()) for t in self.adapters.tables.values() if t.num_experts > 1)
            self.adapters.step(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mean = loss.detach().clone()
            if self.of > 1:
                dist.all_reduce(mean)
            ranks = {name: r.tolist() for name, r in self.adapters.ranks().items()}
            history.append((mean.item() / self.of, ranks, self.live()))
        return history

    def live(self):
        """Of each table, as the ops of this process will find it: the sampled prefixes, and where the gate is zero."""
        tables = self.adapters.tables.items()
        return {name: (t.train_ranks.tolist(), t.gate.eq(0).nonzero().flatten().tolist()) for name, t in tables}

    def state(self):
        """For torch.distributed.checkpoint."""
        optimizer = get_optimizer_state_dict(self.adapters.model, self.optimizer)
        return {"adapters": self.adapters, "optimizer": optimizer}

    def resume(self, folder):
        """From what torch.distributed.checkpoint saved."""
        for parameter in self.adapters.parameters():  # the optimizer's state is made by a first step
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(self.adapters.model, self.optimizer, state["optimizer"])


def in_process(share, of, folder, tasks):
    """Run each task, a function of (share, of, folder), in a group of processes; its result goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{of}", rank=share, world_size=of)
    for name, task, arguments in tasks:
        torch.save(task(share, of, folder, *arguments), folder / f"{name}-{of}-{share}.pt")
    dist.destroy_process_group()


def in_processes(of, folder, tasks):
    mp.spawn(in_process, (of, folder, tasks), nprocs=of)
    return {name: [torch.load(folder / f"{name}-{of}-{share}.pt") for share in range(of)] for name, _, _ in tasks}


def whole_run(share, of, folder, how):
    run = Run(how, share, of)
    return run.train(range(STEPS)), run.idle


def interrupted_run(share, of, folder):
    """FSDP2, saved in the middle, on all processes; and what becomes of it."""
    run = Run("fsdp", share, of)
    run.train(range(HALF))
    run.adapters.save(folder / "saved")
    dcp.save(run.state(), checkpoint_id=folder / "dcp")
    before = fingerprint(run.adapters)
    return before, run.train(range(HALF, STEPS))


def resumed_run(share, of, folder):
    run = Run("fsdp" if of > 1 else "plain", share, of)
    run.resume(folder / "dcp")
    resumed = fingerprint(run.adapters)
    history = run.train(range(HALF, STEPS))
    other = Run("fsdp" if of > 1 else "plain", share, of)
    other.adapters.load(folder / "saved")
    return resumed, history, fingerprint(other.adapters)


def priced_run(share, of, folder, size, accumulation):
    """A price per component inside Hugging Face's Trainer; all rows in each step, however they are split."""
    if of > 1:
        as_launched(share, of)
    model, adapters = priced()
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    run = trainer(model, adapters, folder, lr_scheduler_type="constant", **split)
    assert run.args.world_size == of and size * accumulation * of == len(run.train_dataset)
    run.train()
    (policy,) = adapters.policies
    return policy.first_loss, policy.rho, policy.k


def fingerprint(adapters: Adapters) -> dict[str, Tensor]:
    """All parameters, whole, and what the policies remember."""
    found = {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in adapters.named_parameters()
    }
    for index, policy in enumerate(adapters.policies):
        found |= {
            f"{index}.{key}": torch.as_tensor(v) for key, v in policy.state_dict().items() if not isinstance(v, str)
        }
    return found


def refusals(share, of, folder):
    """What is not possible while parameters are divided; and the module itself, which works."""
    adapters = Run("fsdp", share, of).adapters
    said = []
    before = fingerprint(adapters)
    for attempt in (adapters.merge, lambda: adapters.export(folder / "out"), lambda: adapters.load(folder / "compact")):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    after = fingerprint(adapters)
    unchanged = all(torch.equal(after[key], before[key]) for key in before)
    module = adapters.modules["model.layers.0.self_attn.q_proj"]
    module.set_rank(2)
    torch.nn.init.ones_(module.lora_B)
    module.set_rank(5)
    return (
        said,
        unchanged,
        module.lora_B.full_tensor(),
        module.delta_weight() - module.scaling * module.lora_A.full_tensor()[:2].sum(0),
    )


def parallel_models(share, of, folder):
    """What apply_lora says to models that transformers has divided itself, by experts and by outputs."""
    from transformers.distributed import DistributedConfig

    said = []
    for config, target in (
        (DistributedConfig(fsdp_size=of, ep_size=of), "experts"),
        (DistributedConfig(tp_size=of), "all-linear"),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
        try:
            apply_lora(model, METHODS[target], target)
        except ValueError as error:
            said.append(str(error))
    run = Run("plain")  # and where it is the user who divides them, once there are adapters
    experts, mesh = run.model.model.layers[0].mlp.experts, init_device_mesh("cpu", (of,))
    for name, weight in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=False))
    try:
        run.train([0])
    except ValueError as error:
        said.append(str(error))
    return said


def until_one_is_killed(share, of, folder):
    """Saves after each step; the second process dies before its third step."""
    run = Run("ddp", share, of)
    for step in range(STEPS):
        if share == 1 and step == 2:
            os._exit(1)
        run.train([step])
        run.adapters.save(folder / "last")


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        make_model().save_pretrained(Path(path, "model"))
        yield Path(path)


@pytest.fixture(scope="module")
def alone():
    return Run("plain").train(range(STEPS))


@pytest.fixture(scope="module")
def four(folder):
    tasks = [(how, whole_run, (how,)) for how in ("ddp", "fsdp")]
    return in_processes(4, folder, [*tasks, ("interrupted", interrupted_run, ())])


@pytest.fixture(scope="module")
def two(folder, four):
    compact = Run("plain").adapters
    for policy in compact.policies:
        policy.frozen = True
    compact.compact()
    compact.save(folder / "compact")
    others = {"resumed": resumed_run, "refused": refusals, "parallel": parallel_models}
    tasks = [(how, whole_run, (how,)) for how in ("ddp", "fsdp", "fsdp bf16")]
    tasks += [(name, task, ()) for name, task in others.items()]
    tasks += [("priced", priced_run, (12, 1)), ("priced, accumulated", priced_run, (6, 2))]
    return in_processes(2, folder, [*tasks, ("accelerate", whole_run, ("accelerate",))])


@pytest.mark.parametrize(
    ("of", "how"), [("two", "ddp"), ("two", "fsdp"), ("two", "accelerate"), ("four", "ddp"), ("four", "fsdp")]
)
def test_processes_do_what_one_does(of, how, alone, request):
    """Losses, ranks and sampled prefixes of each step; experts without rows in one process included."""
    results = request.getfixturevalue(of)[how]
    for history, _ in results:
        assert history == results[0][0], "processes must not differ, not by a bit"
        assert_same_run(history, alone)
    assert sum(idle for _, idle in results) > 0, "some expert must go without rows in some process"
    first, last = alone[0][1], alone[-1][1]
    prefixes = [live["model.layers.0.self_attn.q_proj"][0] for *_, live in alone]
    assert len({*map(tuple, prefixes)}) > 2, "prefixes must differ from step to step"
    assert sum(first["model.layers.0.mlp.experts"]) < sum(last["model.layers.0.mlp.experts"]) == 4 * EXPERTS
    assert len({rank for name, rank in last.items() if "attn" in name}) > 1, "the task must move the ranks"


def assert_same_run(history, expected):
    """Ranks and prefixes are equal, losses up to rounding."""
    assert [rest for _, *rest in history] == [rest for _, *rest in expected]
    torch.testing.assert_close([loss for loss, *_ in history], [loss for loss, *_ in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["priced", "priced, accumulated"])
def test_the_price_of_a_component_is_that_of_one_process(how, two, tmp_path):
    """Its unit is the loss of all processes in the first step, which the callback takes from the trainer."""
    first_loss, rho, k = priced_run(0, 1, tmp_path, 24, 1)
    assert rho.sum() != pytest.approx(3 * len(rho), abs=1), "the price must tell"
    for found_loss, found_rho, found_k in two[how]:
        torch.testing.assert_close(found_loss, first_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_rho, rho, rtol=1e-3, atol=1e-3)
        assert torch.equal(found_k, k)


def test_mixed_precision(two, alone):
    """bf16 parameters within the layers, fp32 outside: one history in all processes, near that of fp32."""
    results = [history for history, _ in two["fsdp bf16"]]
    assert results[0] == results[1]
    torch.testing.assert_close([loss for loss, *_ in results[0]], [loss for loss, *_ in alone], rtol=0.05, atol=0.05)
    assert results[0] != alone


def test_four_processes_save_and_two_or_one_resume(folder, four, two):
    """By ``Adapters.save`` and by torch.distributed.checkpoint: every bit is back, and the run goes on as it would."""
    saved, expected = four["interrupted"][0]
    results = [*two["resumed"], resumed_run(0, 1, folder)]
    for resumed, history, loaded in results:
        for found in (resumed, loaded):
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[key], saved[key]) for key in saved)
        assert_same_run(history, expected)


def test_what_needs_whole_parameters_says_so(two):
    for said, unchanged, lora_B, rest in two["refused"]:
        assert len(said) == 3 and unchanged
        assert all("divided among processes" in text and "load them in one process" in text for text in said)
        assert lora_B[:2].all() and not lora_B[2:5].any() and lora_B[5:].all(), "growth zeroes what is born, no more"
        torch.testing.assert_close(rest, torch.zeros_like(rest))


def test_tensor_and_expert_parallel_models_are_refused(two):
    for said in two["parallel"]:
        assert len(said) == 3
        assert "experts is divided among processes" in said[0] and "ep_size" in said[0]
        assert "_proj is divided among processes" in said[1]
        assert "weight is divided among processes, a DTensor" in said[2]


def test_a_killed_process_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    """The other process stops with an error, it does not wait."""
    start = mp.spawn(in_process, (2, tmp_path, [("killed", until_one_is_killed, ())]), nprocs=2, join=False)
    processes = start.processes
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 1]
    adapters = load_adapter(make_model(), tmp_path / "last")
    assert [policy.t for policy in adapters.policies] == [2, 2]
