"""VariableRankLoRAGroupedLinear and VariableRankLoRAExperts as modules, and Adapters over them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrlora_ops import (
    DynamicRank,
    FixedRank,
    LearnedRank,
    RankTable,
    Routing,
    VariableRankLoRAExperts,
    VariableRankLoRAGroupedLinear,
    apply_lora,
)
from tests._models import optimize
from tests.test_checkpoint import assert_same, snapshot

E, K, N = 4, 12, 10
OFFSETS = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)  # and one row of no expert
RANKS = [3, 0, 6, 2]


def layer(*, trained: bool = True, **options) -> VariableRankLoRAGroupedLinear:
    torch.manual_seed(0)
    made = VariableRankLoRAGroupedLinear(E, K, N, **{"max_rank": 6, "rank": 2, "pool_rank": 3} | options)
    if trained:
        nn.init.normal_(made.lora_B, std=0.3)
    return made


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(10, K, generator=torch.Generator().manual_seed(1)).to(dtype)


class MoE(nn.Module):
    """A layer of experts as people write it, whose two projections share a table, behind a linear layer."""

    def __init__(self, **options) -> None:
        super().__init__()
        settings = {"rank": 2, "max_rank": 6, "pool_size": 3 * E, "num_projections": 2} | options
        self.inp, self.router = nn.Linear(K, K), nn.Linear(K, E)
        table = RankTable.uniform(E, **settings)
        self.up = VariableRankLoRAGroupedLinear(E, K, 2 * N, table=table, projection=0)
        self.down = VariableRankLoRAGroupedLinear(E, N, K, bias=True, table=table, projection=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inp(x)
        weights, index = self.router(x).softmax(-1).topk(2)
        routing = Routing.from_topk(index, E)
        gate, up = self.up(x[routing.token_index], routing.group_offsets).chunk(2, -1)
        y = self.down(F.silu(gate) * up, routing.group_offsets)
        return x + (y[routing.row_position] * weights[..., None]).sum(1)


def moe(seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    return MoE(**options)


def transformers_block(seed: int = 0) -> nn.Module:
    """A linear layer, a router and the experts module of Mixtral."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=E)
    config._experts_implementation = "eager"

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.router = nn.Linear(16, 16), nn.Linear(16, E)
            self.experts = mixtral.MixtralExperts(config)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.inp(x)
            weights, index = self.router(x).softmax(-1).topk(2)
            return x + self.experts(x, index, weights)

    torch.manual_seed(seed)
    return Block()


def test_construction():
    made = layer(trained=False)
    assert made.weight.shape == (E, N, K) and made.bias is None and not made.weight.requires_grad
    assert made.lora_A.shape == (3 * E, K) and made.lora_B.shape == (3 * E, N)
    assert made.scaling == 2 and made.ranks.tolist() == [2] * E
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert not made.lora_B.any() and made.lora_A.abs().max() <= K**-0.5
    assert layer(lora_alpha=3).scaling == 0.5
    assert layer(pool_rank=None).lora_A.shape[0] == 6 * E
    assert layer(bias=True).bias.shape == (E, N) and not layer(bias=True).bias.requires_grad
    assert layer(device="meta", trained=False).lora_A.is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, "rank 7 of expert 0 is outside 0..6"),
        ({"pool_rank": 1}, "the ranks sum to 8, but the pool holds 4"),
        ({"pool_rank": 7}, "lower pool_size or raise max_rank"),
        ({"table": RankTable(3, 2, 6)}, "the table has 3 experts and 1 projections"),
        ({"table": RankTable(E, 2, 8), "projection": 1}, "this is projection 1 of 4 experts.*num_projections"),
    ],
)
def test_bad_construction(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_forward_is_the_sum_of_base_and_update():
    made = layer(bias=True)
    made.set_ranks(RANKS)
    nn.init.normal_(made.lora_B, std=0.3)
    x, y = rows(), made(rows(), OFFSETS)
    for expert, (low, high) in enumerate(pairwise(OFFSETS.tolist())):
        weight = made.weight[expert] + made.delta_weight(expert)
        torch.testing.assert_close(y[low:high], F.linear(x[low:high], weight, made.bias[expert]))
    assert not y[OFFSETS[-1] :].any()
    assert not made.delta_weight(1).any() and made.delta_weight(2).any()


@pytest.mark.parametrize("training", [True, False])
def test_growth_changes_no_bit(training):
    """While other experts shrink to make room."""
    made = layer().train(training)
    made.set_ranks([2, 3, 3, 0])
    nn.init.normal_(made.lora_B, std=0.3)
    before, weights = made(rows(), OFFSETS), [made.delta_weight(expert) for expert in range(3)]
    made.set_ranks([2, 3, 6, 1])
    assert torch.equal(made(rows(), OFFSETS), before)
    assert all(torch.equal(made.delta_weight(expert), old) for expert, old in enumerate(weights))
    with pytest.raises(ValueError, match="the ranks sum to 13, but the pool holds 12"):
        made.set_ranks([2, 3, 6, 2])
    assert made.ranks.tolist() == [2, 3, 6, 1]


def test_a_shared_table():
    """One module alone cannot change the ranks of both; Adapters can, and both projections grow bit-identically."""
    model = moe()
    with pytest.raises(ValueError, match="the table is shared with other projections"):
        model.up.set_ranks(RANKS)
    for module in (model.up, model.down):
        nn.init.normal_(module.lora_B, std=0.3)
    x = rows()
    before = model(x)
    born = model.up.table.set_ranks([4, 2, 2, 3])
    for module in (model.up, model.down):
        module.lora_B.data[born] = 0
    assert torch.equal(model(x), before)


def test_statistics_of_a_shared_table():
    """Each projection has its own sensitivities; rows are counted once."""
    model = moe()
    for module in (model.up, model.down):
        nn.init.normal_(module.lora_B, std=0.3)
    counted: list[Tensor] = []
    model.up.register_forward_pre_hook(lambda _, args: counted.append(args[1].diff()))
    for _ in range(2):
        model(rows()).square().sum().backward()
    table = model.up.table
    assert table.row_counts.tolist() == sum(counted).tolist()
    up, down = table.sensitivity.chunk(2)
    for module, c in ((model.up, up), (model.down, down)):
        inner = (module.lora_A.grad * module.lora_A).sum(1)
        torch.testing.assert_close(c, inner, rtol=1e-3, atol=1e-3)
    assert model.eval()(rows()).requires_grad
    table.clear_statistics()
    model(rows()).sum().backward()
    assert not table.row_counts.any(), "an evaluation is no training demand"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merge(dtype):
    made = layer(bias=True).to(dtype)
    made.set_ranks(RANKS)
    nn.init.normal_(made.lora_B, std=0.3)
    merged = made.merge()
    assert merged.max_rank == 0 and merged.lora_A.shape == (0, K) and merged.weight.data_ptr() != made.weight.data_ptr()
    x = rows(dtype)
    tolerance = 4 * torch.finfo(dtype).eps * made(x, OFFSETS).abs().max().item()
    torch.testing.assert_close(merged(x, OFFSETS), made(x, OFFSETS), rtol=0, atol=max(tolerance, 1e-12))


def test_state_dict_and_deepcopy():
    made = layer()
    made.set_ranks([0, 6, 1, 4])
    made.set_ranks(RANKS)
    nn.init.normal_(made.lora_B, std=0.3)
    x, expected = rows(), made(rows(), OFFSETS)
    other = layer()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x, OFFSETS), expected)
    twin = copy.deepcopy(made)
    made.set_ranks([0] * E)
    assert torch.equal(twin(x, OFFSETS), expected) and not torch.equal(made(x, OFFSETS), expected)
    model = moe()
    twin_model = copy.deepcopy(model)
    assert twin_model.up.table is twin_model.down.table is not model.up.table


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_change_of_dtype(dtype):
    """Parameters follow; gate and demand stay fp32 or wider, and still report."""
    made = layer().to(dtype)
    y = made(rows(dtype), OFFSETS)
    assert y.dtype == made.lora_A.dtype == dtype
    y.float().square().sum().backward()
    assert made.sensitivity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert made.sensitivity.any() and made.table.row_counts.tolist() == [3, 0, 5, 1]


def test_made_on_meta():
    """As large models are: from a state dict, or with fresh memory."""
    made, source = layer(device="meta", trained=False), layer()
    made.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(made(rows(), OFFSETS), source(rows(), OFFSETS))


@pytest.mark.parametrize("make", [moe, transformers_block])
def test_a_child_of_experts_moves_and_copies(make):
    model = make()
    adapters = apply_lora(model, FixedRank(2), None if make is moe else "experts")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 12 if make is moe else 16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    for parameter in adapters.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(twin(x), model(x))
    torch.testing.assert_close(twin.double()(x.double()).float(), twin.float()(x), rtol=1e-4, atol=1e-4)


def make(kind: str, seed: int):
    """The same frozen weights each time, other adapters for each seed: DynamicRank or LearnedRank on the experts."""
    dense = LearnedRank(2, 4, total_steps=10, lr=0.5)
    if kind == "learned experts":
        methods = {"experts": LearnedRank(2, 4, total_steps=10, lr=0.5), "inp": FixedRank(2)}
    else:
        methods = {"experts": DynamicRank(1, 2, 4, total_steps=10, interval=2, grow_fraction=0.4), "inp": dense}
    model = transformers_block()
    torch.manual_seed(seed + 1)
    adapters = apply_lora(model, methods)
    return model, adapters, torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0)


def train(model, adapters, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        x = torch.randn(20, 16)
        losses.append(optimize((model(x) - x.sin()).square().mean(), adapters, optimizer))
    return losses


@pytest.mark.parametrize("kind", ["dynamic experts", "learned experts"])
@pytest.mark.parametrize("saved_at", [0, 3, 9])
def test_resume_bit_for_bit(kind, saved_at, tmp_path):
    """Before the first step, while ranks change and after the freeze; DynamicRank and LearnedRank in one model."""
    model, adapters, optimizer = make(kind, 0)
    first = adapters.ranks()
    train(model, adapters, optimizer, range(saved_at))
    adapters.save(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = snapshot(adapters)
    expected = train(model, adapters, optimizer, range(saved_at, 13))

    resumed, others, optimizer = make(kind, 1)
    train(resumed, others, optimizer, range(3))
    others.load(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert_same(snapshot(others), saved)
    assert train(resumed, others, optimizer, range(saved_at, 13)) == expected
    assert_same(snapshot(others), snapshot(adapters))
    assert torch.equal(resumed(torch.ones(3, 16)), model(torch.ones(3, 16)))
    ranks = adapters.ranks()
    assert any(not torch.equal(ranks[name], first[name]) for name in ranks), "no rank ever changed"


def test_compact_with_experts(tmp_path):
    """Live components alone, the same output, and training goes on; a checkpoint of it loads into a fresh model."""
    model, adapters, optimizer = make("dynamic experts", 0)
    with pytest.raises(RuntimeError, match="still changes ranks"):
        adapters.compact(optimizer)
    train(model, adapters, optimizer, range(11))
    x = torch.randn(5, 16)
    before, adapter = model.eval()(x), adapters.modules["experts"]
    adapters.compact(optimizer)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    live = int(adapter.ranks.sum())
    assert adapter.table.pool_size == live == 2 * E and adapter.max_rank == int(adapter.ranks.max())
    for pool in adapter.pools().values():
        assert pool.lora_A.shape[0] == pool.lora_B.shape[0] == live
        assert optimizer.state[pool.lora_A]["exp_avg"].shape == pool.lora_A.shape
    train(model.train(), adapters, optimizer, range(11, 13))
    adapters.save(tmp_path)
    other, others, _ = make("dynamic experts", 1)
    others.load(tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_adapters_over_modules_of_ones_own(tmp_path):
    """Two projections, one table: set once, saved, restored and merged."""
    model, other = moe(), moe(1)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k and "table" not in k}, False)
    method = DynamicRank(1, 2, 4, total_steps=10, interval=2, grow_fraction=0.4)
    adapters, others = apply_lora(model, method), apply_lora(other, method)
    assert list(adapters.modules) == ["up", "down"] and list(adapters.tables) == ["up"]
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    for _ in range(10):
        optimize((model(rows()) - rows().sin()).square().mean(), adapters, optimizer)
    assert int(model.up.ranks.sum()) == 2 * E
    for folder in ("whole", "compact"):
        adapters.save(tmp_path / folder)
        others.load(tmp_path / folder)
        expected = model.eval()(rows())
        assert torch.equal(other.eval()(rows()), expected)
        adapters.compact(optimizer)
    torch.testing.assert_close(adapters.merge()(rows()), expected, rtol=1e-4, atol=1e-5)
    assert model.up.max_rank == 0


def test_summary_names_experts_without_an_adapter(capsys):
    model = transformers_block()
    adapters = apply_lora(model, FixedRank(2), "all-linear")
    text = adapters.summary()
    assert "not adapted: experts, name it or 'experts' in targets" in text
    assert capsys.readouterr().out == text + "\n"
    adapters = apply_lora(transformers_block(), FixedRank(2), ["all-linear", "experts"])
    text = adapters.summary()
    assert "not adapted" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("experts.gate_up_proj"))
    assert line.split()[1:6] == [str(E), "16", "16", str(2 * E), "2"]


def test_experts_take_no_dropout():
    model = transformers_block()
    with pytest.raises(ValueError, match="experts: experts have no dropout"):
        apply_lora(model, FixedRank(2), "experts", dropout=0.1)
    assert not hasattr(model.experts, "lrlora") and all(p.requires_grad for p in model.parameters())


def test_experts_on_their_own():
    """``from_experts``, ``set_ranks`` that changes no bit, and a merge that leaves the module as it was."""
    block = transformers_block()
    adapter = VariableRankLoRAExperts.from_experts(block.experts, max_rank=6, rank=1, pool_rank=3)
    x = torch.randn(20, 16)
    for pool in adapter.pools().values():
        nn.init.normal_(pool.lora_B, std=0.3)
    before = block(x)
    adapter.set_ranks([1, 4, 1, 6])
    assert torch.equal(block(x), before) and adapter.ranks.tolist() == [1, 4, 1, 6]
    with pytest.raises(ValueError, match=r"outside 0\.\.6"):
        adapter.set_ranks([7, 1, 1, 1])
    merged = adapter.merge(block.experts)
    assert merged.config._experts_implementation == "eager" and not hasattr(merged, "lrlora")
    assert torch.equal(block(x), before)
    weights, index = torch.rand(20, 2), torch.stack([torch.randperm(E)[:2] for _ in range(20)])
    torch.testing.assert_close(merged(x, index, weights), block.experts(x, index, weights), rtol=1e-4, atol=1e-4)


def test_a_merge_that_is_wrong_is_refused(monkeypatch):
    block = transformers_block()
    adapters = apply_lora(block, FixedRank(2), "experts")
    nn.init.normal_(block.experts.lrlora.down_proj.lora_B)
    monkeypatch.setattr(VariableRankLoRAExperts, "add_update", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"experts: the merged layer differs from the adapter's forward"):
        adapters.merge()
    assert hasattr(block.experts, "lrlora")
