"""RankTable: who owns which components, through growth, shrinkage, failure, saving, copying and moving."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lrlora_ops import RankTable


def owned(table: RankTable) -> list[list[int]]:
    """Pool rows of each expert, in the order of its components."""
    return [rows[:rank] for rows, rank in zip(table.components.tolist(), table.ranks.tolist(), strict=True)]


@st.composite
def tables(draw: st.DrawFn) -> RankTable:
    num_experts, max_rank = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    pool_size = draw(st.integers(0, num_experts * max_rank))
    return RankTable(num_experts, max_rank, pool_size, num_projections=draw(st.integers(1, 3)))


@st.composite
def affordable_ranks(draw: st.DrawFn, table: RankTable) -> list[int]:
    ranks, left = [], table.pool_size
    for _ in range(table.num_experts):
        ranks.append(draw(st.integers(0, min(table.max_rank, left))))
        left -= ranks[-1]
    return draw(st.permutations(ranks))


class AnyHistory(RuleBasedStateMachine):
    """A table under any sequence of requests, beside what it must hold: ``expected``, pool rows by expert."""

    @initialize(table=tables())
    def start(self, table: RankTable) -> None:
        self.table, self.expected = table, [[] for _ in range(table.num_experts)]

    @rule(data=st.data())
    def set_ranks(self, data: st.DataObject) -> None:
        ranks = data.draw(affordable_ranks(self.table))
        before = self.expected
        new = self.table.set_ranks(ranks)
        self.expected = owned(self.table)
        assert new.dtype == torch.int64
        grown = []
        for old, now, rank in zip(before, self.expected, ranks, strict=True):
            kept = min(len(old), rank)
            assert now[:kept] == old[:kept], "an expert lost a component that it should have kept"
            grown += now[kept:]
        assert new.tolist() == grown

    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        """The form without checks and without a value on the host does what set_ranks does."""
        ranks = data.draw(affordable_ranks(self.table))
        twin = copy.deepcopy(self.table)
        new = twin.set_ranks(ranks)
        live = self.table.update(torch.tensor(ranks))
        assert live.dtype == torch.bool and live.shape == (self.table.pool_size,)
        assert live.nonzero().flatten().tolist() == new.tolist()
        self.expected = owned(twin)

    @rule(data=st.data())
    @precondition(lambda self: self.table.pool_size)
    def ask_for_too_much(self, data: st.DataObject) -> None:
        ranks = data.draw(affordable_ranks(self.table))
        spoiled = data.draw(st.sampled_from(["negative", "above max_rank", "above the pool", "too few", "too many"]))
        if spoiled == "above the pool":
            ranks = [self.table.max_rank] * self.table.num_experts
            if sum(ranks) <= self.table.pool_size:
                return
        elif spoiled in ("too few", "too many"):
            ranks = ranks[:-1] if spoiled == "too few" else [*ranks, 0]
        else:
            ranks[data.draw(st.integers(0, len(ranks) - 1))] = -1 if spoiled == "negative" else self.table.max_rank + 1
        with pytest.raises(ValueError, match="rank"):
            self.table.set_ranks(ranks)

    @rule()
    def move_through_a_state_dict(self) -> None:
        state = copy.deepcopy(self.table.state_dict())
        self.table = RankTable(
            self.table.num_experts,
            self.table.max_rank,
            self.table.pool_size,
            num_projections=self.table.num_projections,
        )
        self.table.load_state_dict(state)

    @rule()
    def compact(self) -> None:
        """The live rows close up, expert by expert, and the caller is told which they were."""
        before, ranks = self.expected, self.table.ranks.tolist()
        rows = self.table.compact()
        assert rows.dtype == torch.int64 and rows.tolist() == [row for own in before for row in own]
        assert self.table.ranks.tolist() == ranks
        assert (self.table.max_rank, self.table.pool_size) == (max(ranks), sum(ranks))
        fresh = iter(range(len(rows)))
        self.expected = [[next(fresh) for _ in range(rank)] for rank in ranks]

    @rule(data=st.data(), max_rank=st.integers(0, 6))
    def reallocate(self, data: st.DataObject, max_rank: int) -> None:
        pool_size = data.draw(st.integers(0, self.table.num_experts * max_rank))
        self.table.reallocate(max_rank, pool_size)
        assert (self.table.max_rank, self.table.pool_size) == (max_rank, pool_size)
        self.expected = [[] for _ in self.expected]

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        if how == "deepcopy":
            self.table = copy.deepcopy(self.table)
        else:
            buffer = io.BytesIO()
            torch.save(self.table, buffer)
            buffer.seek(0)
            self.table = torch.load(buffer, weights_only=False)

    @invariant()
    def owns_what_it_should(self) -> None:
        assert owned(self.table) == self.expected
        assert torch.equal(self.table.train_ranks, self.table.ranks)
        assert torch.equal(self.table.gate, torch.ones(self.table.num_projections * self.table.pool_size))
        assert torch.equal(self.table.demand, torch.zeros(2, self.table.num_experts))

    @invariant()
    def every_live_row_has_one_owner(self) -> None:
        live = [row for rows in owned(self.table) for row in rows]
        assert len(set(live)) == len(live)
        assert all(0 <= row < self.table.pool_size for row in live)

    @invariant()
    def a_reserved_row_stays_with_its_expert(self) -> None:
        if self.table.reserved:
            max_rank = self.table.max_rank
            for expert, rows in enumerate(owned(self.table)):
                assert rows == list(range(expert * max_rank, expert * max_rank + len(rows)))


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=50, stateful_step_count=12, deadline=None, derandomize=True)


def test_uniform():
    table = RankTable.uniform(3, 2)
    assert (table.max_rank, table.pool_size, table.ranks.tolist()) == (2, 6, [2, 2, 2])
    table = RankTable.uniform(3, 2, max_rank=5, pool_size=7)
    assert (table.max_rank, table.pool_size, table.ranks.tolist()) == (5, 7, [2, 2, 2])
    assert table.ranks.dtype == table.components.dtype == table.train_ranks.dtype == torch.int32
    assert not table.reserved and RankTable(2, 3, 6).reserved


@pytest.mark.parametrize("ranks", [[2.0, 2.0], torch.tensor([2.5, 2.0])])
def test_ranks_are_integers(ranks):
    with pytest.raises(TypeError, match="integer"):
        RankTable(2, 4, 6).set_ranks(ranks)


def test_freed_rows_are_used_again():
    table = RankTable.uniform(2, 3, max_rank=6, pool_size=6)
    assert sorted(table.set_ranks([0, 6]).tolist()) == [0, 1, 2]


def test_experts_keep_their_rows_while_others_grow_and_shrink():
    table = RankTable.uniform(3, 2, max_rank=4, pool_size=7)
    assert owned(table) == [[0, 1], [2, 3], [4, 5]]
    assert table.set_ranks([1, 4, 2]).tolist() == [1, 6]  # the first expert's row, then the free one
    assert owned(table) == [[0], [2, 3, 1, 6], [4, 5]]
    assert table.set_ranks([3, 2, 2]).tolist() == [1, 6]
    assert owned(table) == [[0, 1, 6], [2, 3], [4, 5]]


@pytest.mark.parametrize("pool_size", [0, 7, 12])
def test_update_reads_no_value_on_the_host(pool_size):
    """On the meta device there are no values to read."""
    table = RankTable(3, 4, pool_size, device="meta")
    live = table.update(torch.empty(3, dtype=torch.int64, device="meta"))
    assert live.is_meta and live.shape == (pool_size,)


def test_ranks_may_be_a_tensor():
    table = RankTable(2, 4, 6)
    table.set_ranks(torch.tensor([4, 2]))
    assert table.ranks.tolist() == [4, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gate_stays_fp32(dtype):
    """Half-precision gates would lose the sensitivity, which is the gate's gradient."""
    table = RankTable.uniform(2, 3)
    with torch.no_grad():
        table.gate[1] = 0
    table.train_ranks[0] = 2
    table.to(dtype)
    assert table.gate.dtype == torch.float32 and table.gate.requires_grad and table.gate.is_leaf
    assert table.gate.tolist() == [1, 0, 1, 1, 1, 1]
    assert table.train_ranks.tolist() == [2, 3]
    assert table.ranks.dtype == table.train_ranks.dtype == torch.int32
    assert table.demand.dtype == torch.float32 and table.demand.requires_grad and table.demand.is_leaf
    assert RankTable.uniform(2, 3).double().gate.dtype == torch.float64


def test_materialised_from_meta():
    """Made on meta, allocated, loaded: what transformers and FSDP do with large models."""
    source = RankTable.uniform(2, 3, max_rank=4, pool_size=7)
    with torch.device("meta"):
        table = RankTable(2, 4, 7)
    assert table.gate.is_meta and table.ranks.is_meta
    table.to_empty(device="cpu")
    table.load_state_dict(source.state_dict())
    assert owned(table) == owned(source)
    assert table.train_ranks.tolist() == [3, 3]
    assert table.gate.tolist() == [1] * 7 and table.gate.requires_grad
    assert table.demand.tolist() == [[0, 0], [0, 0]] and table.demand.requires_grad
    assert table.to("meta").gate.is_meta and table.train_ranks.is_meta


def test_a_copy_is_on_its_own():
    original = RankTable.uniform(1, 2, max_rank=4)
    copied = copy.deepcopy(original)
    copied.load_state_dict(RankTable.uniform(1, 3, max_rank=4).state_dict())
    assert (original.train_ranks.item(), copied.train_ranks.item()) == (2, 3)


def test_state_dict_holds_ownership_alone():
    """Gates and training ranks belong to a method; they must not reach checkpoints, optimizers or DDP."""
    table = RankTable.uniform(2, 3)
    assert set(table.state_dict()) == {"components", "ranks"}
    assert list(table.parameters()) == []


def test_sensitivity_accumulates_until_cleared():
    table = RankTable.uniform(1, 3)
    assert table.sensitivity.tolist() == [0, 0, 0]
    c = torch.tensor([1.0, -2.0, 0.5])
    (table.gate @ c).backward()
    (table.gate @ c).backward()
    assert torch.equal(table.sensitivity, 2 * c)
    memory = table.sensitivity.data_ptr()
    assert torch.equal(copy.deepcopy(table).sensitivity, 2 * c)
    table.clear_statistics()
    assert table.sensitivity.tolist() == [0, 0, 0]
    (table.gate @ c).backward()
    assert torch.equal(table.sensitivity, c)
    assert table.sensitivity.data_ptr() == memory  # a captured graph keeps writing there


def test_what_was_routed_accumulates_until_cleared():
    """Rows and routing weights per expert arrive as the gradient of a leaf, like the sensitivity."""
    table = RankTable(3, 2, 4, num_projections=2)
    assert table.routed.tolist() == [[0, 0, 0], [0, 0, 0]]
    routed = torch.tensor([[4.0, 0.0, 2.0], [1.5, 0.0, 0.5]])
    for _ in range(2):
        (table.demand * routed).sum().backward()
    assert torch.equal(table.routed, 2 * routed) and table.row_counts.tolist() == [8, 0, 4]
    memory = table.routed.data_ptr()
    table.clear_statistics()
    assert table.routed.tolist() == [[0, 0, 0], [0, 0, 0]]
    (table.demand * routed).sum().backward()
    assert torch.equal(table.routed, routed) and table.routed.data_ptr() == memory


def test_resize_keeps_ranks_and_drops_statistics():
    table = RankTable(2, 4, 8, num_projections=2)
    table.set_ranks([3, 1])
    (table.gate.sum() + table.demand.sum()).backward()
    table.resize(3)
    assert (table.max_rank, table.pool_size, table.ranks.tolist(), table.train_ranks.tolist()) == (3, 6, [3, 1], [3, 1])
    assert owned(table) == [[0, 1, 2], [3]]
    assert table.sensitivity.tolist() == [0] * 12 and table.routed.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="rank 3 of expert 0"):
        table.resize(2)
    assert (table.max_rank, table.pool_size, table.gate.numel()) == (3, 6, 12)
    with pytest.raises(ValueError, match="shares a pool"):
        RankTable(2, 4, 7).resize(4)


def test_set_ranks_writes_in_place():
    """Captured graphs, compiled code and optimizers hold these tensors."""
    table = RankTable.uniform(2, 3, max_rank=4)
    names = ("components", "ranks", "train_ranks", "gate", "demand")
    tensors = [getattr(table, name) for name in names]
    table.set_ranks([4, 1])
    assert all(tensor is getattr(table, name) for tensor, name in zip(tensors, names, strict=True))
