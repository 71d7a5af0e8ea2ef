"""Who competes on experts: each provider and each peer's adapter, by the fp64 oracle; routing and its skew."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft", reason="needs peft, as the benchmarks do")

from benchmarks import dense_peers, moe, moe_peers, peers, projection
from benchmarks.moe_providers import ROUTINGS, ExpertsOracle, ExpertsProblem
from benchmarks.providers import Oracle, Problem, Unavailable
from benchmarks.shapes import ExpertsShape, Shape

CPU = torch.device("cpu")
SHAPE = ExpertsShape("tiny", 40, 6, 2, 24, 16)
STACK = projection.Case(projection.ProjectionShape(40, 4, 24, 16), torch.float32, 8, projection.PEERS)


def problem(ranks=(4,) * 6, dtype=torch.float32, routing="random") -> ExpertsProblem:
    return ExpertsProblem.random(SHAPE, dtype, list(ranks), CPU, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["base", "base, eager", "lrlora", "lrlora, padded", "PEFT", "split grouped_mm"])
def test_providers_agree_with_the_oracle(name, routing):
    given = problem(routing=routing)
    ExpertsOracle(given).check(moe.BUILDERS[name](given))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_parity_notices_a_wrong_component(part):
    given = problem()
    provider = moe.BUILDERS["split grouped_mm"](given)
    with torch.no_grad():
        provider.leaves[f"down_proj.{part}"].mul_(1.1)
    with pytest.raises(AssertionError, match="not timed"):
        ExpertsOracle(given).check(provider)


def test_one_rank_for_all_is_what_plain_products_have():
    given = problem(ranks=(4, 8, 0, 4, 4, 4))
    ExpertsOracle(given).check(moe.BUILDERS["lrlora"](given))
    for name in ("split grouped_mm", "PEFT", "axolotl"):
        with pytest.raises(Unavailable, match="one rank for all experts"):
            moe.BUILDERS[name](given)


def test_skewed_routing():
    shape = ExpertsShape("many", 4000, 16, 2, 2, 2)
    counts = {}
    for routing in ROUTINGS:
        index = ExpertsProblem.random(shape, torch.float32, [1] * 16, CPU, routing).index
        assert (index[:, 0] != index[:, 1]).all()
        counts[routing] = index.flatten().bincount(minlength=16).tolist()
    assert max(counts["random"]) < 1.3 * min(counts["random"])
    assert counts["hot"][0] == shape.T
    assert max(counts["hot"][1:]) < 1.4 * min(counts["hot"][1:])
    zipf = counts["zipf"]
    assert zipf[0] > 1.4 * zipf[1] > 1.5 * zipf[3] > 2 * zipf[15]


@pytest.mark.parametrize("name", projection.BUILDERS)
def test_projection_providers_agree_with_the_oracle(name):
    build, check = STACK.prepare(CPU)
    provider = build(name, 8)
    check(provider)
    if provider.leaves:
        with torch.no_grad():
            provider.leaves["lora_B"].mul_(1.1)
        with pytest.raises(AssertionError, match="not timed"):
            check(provider)


def scattermoe_like(with_lora: bool) -> types.SimpleNamespace:
    """The signatures of ScatterMoE's ops and of axolotl's, in plain PyTorch."""

    def flatten_sort_count(expert_idxs, num_experts):
        experts, positions = expert_idxs.flatten().sort(stable=True)
        return experts, positions, experts.bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
        expert_biases=None, gates=None, grouped_in=False, grouped_out=False,
    ):  # fmt: skip
        assert expert_offsets.shape == expert_weights.shape[:1]
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        y = torch.stack([row @ expert_weights[e] for row, e in zip(rows, sorted_expert_idxs.tolist(), strict=True)])
        if not grouped_out:
            y = torch.zeros_like(y).index_copy(0, sorted_scattered_idxs, y)
        return y if gates is None else (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)

    def parallel_linear_lora(
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
        lora_A=None, lora_B=None, scaling=1.0, expert_biases=None, gates=None,
        grouped_in=False, grouped_out=False, use_fused_dX=False, use_fused_gather=False,
    ):  # fmt: skip
        experts = expert_weights.shape[0]
        a = lora_A.view(experts, -1, lora_A.shape[1])  # [E * r, K]
        b = lora_B.view(lora_B.shape[0], experts, -1).permute(1, 2, 0)  # [N, E * r]
        adapted = expert_weights + scaling * a.transpose(1, 2) @ b
        order = (sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
        return parallel_linear(inputs, adapted, k, *order, None, gates, grouped_in, grouped_out)

    ops = types.SimpleNamespace(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    if with_lora:
        ops.parallel_linear_lora = parallel_linear_lora
    return ops


class LigerLike:
    """The signature of Liger's function, in plain PyTorch."""

    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32
        rows = torch.einsum("th,tknh->tkn", x, gate_up_proj[top_k_index.long()])
        left, right = rows.chunk(2, -1)
        rows = torch.einsum("tki,tkhi->tkh", F.silu(left) * right, down_proj[top_k_index.long()])
        return (rows * top_k_weights[..., None]).sum(1)


def lorafusion_like(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    """The signature of LoRAFusion's op, in plain PyTorch; like it, of three dimensions only."""
    batch, sequence, _ = x.shape
    assert dropout_p == 0
    return (F.linear(x, linear_w) + alpha * x @ lora_a.t() @ lora_b.t()).reshape(batch, sequence, -1)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("axolotl", scattermoe_like(True)),
        ("ScatterMoE", scattermoe_like(False)),
        ("Liger", types.SimpleNamespace(LigerFusedMoEFunction=LigerLike)),
    ],
)
def test_peers_of_experts_by_their_conventions(name, ops, monkeypatch):
    monkeypatch.setattr(peers.Peer, "load", lambda peer: ops)
    given = problem()
    provider, oracle = moe_peers.BUILDERS[name](given), ExpertsOracle(given)
    oracle.check(provider)
    assert (provider.rank == 0) == (name in moe_peers.TRAIN_THE_WEIGHTS)
    with torch.no_grad():
        next(provider.layer.parameters()).mul_(1.1)
    with pytest.raises(AssertionError, match="not timed"):
        oracle.check(provider)


def test_dense_peer_by_its_conventions(monkeypatch):
    ops = types.SimpleNamespace(fused_linear_lora=lorafusion_like)
    monkeypatch.setattr(peers.Peer, "load", lambda peer: ops)
    given = Problem.random(Shape("tiny", "q_proj", 33, 24, 40), torch.float32, 4, CPU)
    Oracle(given).check(dense_peers.lorafusion(given, 4))


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.repository)
def test_a_missing_peer_says_what_to_set(peer, monkeypatch, tmp_path):
    for variable in (peers.FOLDER, peer.variable):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Unavailable, match=rf"set {peer.variable} to a checkout of github.com/{peer.repository}"):
        peer.load()
    monkeypatch.setenv(peers.FOLDER, str(tmp_path))
    with pytest.raises(Unavailable, match=r"there is no folder .* must lead to a checkout"):
        peer.load()


@pytest.mark.parametrize("variable", [peers.FOLDER, "LRLORA_STAND_IN"])
def test_a_peer_is_imported_from_its_checkout(variable, monkeypatch, tmp_path):
    name = f"stand_in_{variable.lower()}"
    package = tmp_path / "stand-in" / "src" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 5")
    peer = peers.Peer("somebody/stand-in", "LRLORA_STAND_IN", "src", name, "0")
    monkeypatch.setenv(variable, str(tmp_path if variable == peers.FOLDER else tmp_path / "stand-in"))
    assert peer.load().value == 5
    broken = peers.Peer("somebody/stand-in", "LRLORA_STAND_IN", "src", f"{name}.absent", "0")
    with pytest.raises(Unavailable, match=r"cannot be imported \(ModuleNotFoundError"):
        broken.load()
