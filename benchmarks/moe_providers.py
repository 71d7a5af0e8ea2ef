"""Who is timed on the experts of a Mixture-of-Experts layer, all of them transformers' own module, and the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers import SCALING, Provider, Unavailable, accelerate_all, compare
from benchmarks.shapes import ExpertsShape
from lrlora_ops import VariableRankLoRAExperts

_PROJECTIONS = ("gate_up_proj", "down_proj")
_TOKENS_OF_PARITY = {"cpu": 32, "cuda": 4096}


def zipf_routing(uniform: Tensor) -> Tensor:
    """Expert e is drawn with a weight of 1 / (e + 1), without replacement: by the largest of Gumbel's numbers."""
    popularity = 1 / torch.arange(1, uniform.shape[1] + 1, device=uniform.device)
    return popularity.log() - (-uniform.clamp(1e-12, 1 - 1e-7).log()).log()


def hot_routing(uniform: Tensor) -> Tensor:
    """Every token goes to the first expert, and to others evenly."""
    return uniform.index_fill(1, torch.zeros(1, dtype=torch.long, device=uniform.device), 2.0)


# Uniform random numbers [T, E] -> scores, of which a token's experts have the highest.
ROUTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda uniform: uniform,
    "zipf": zipf_routing,
    "hot": hot_routing,
}


@dataclass(frozen=True)
class ExpertsProblem:
    """The tensors that all providers of a case share.

    x ``[T, H]`` and route ``[T, k]`` require gradients, dy ``[T, H]``, index ``[T, k]``; weights, lora_A and lora_B by
    projection, the pool rows ordered by expert; ranks, components of each expert.
    """

    x: Tensor
    dy: Tensor
    index: Tensor
    route: Tensor
    weights: dict[str, Tensor]
    lora_A: dict[str, Tensor]
    lora_B: dict[str, Tensor]
    ranks: list[int]

    @classmethod
    def random(
        cls, shape: ExpertsShape, dtype: torch.dtype, ranks: list[int], device: torch.device, routing: str = "random"
    ) -> ExpertsProblem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).mul_(scale).to(dtype)

        hidden, inner, experts, pool = shape.hidden, shape.intermediate, shape.num_experts, sum(ranks)
        features = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
        scores = ROUTINGS[routing](torch.rand(shape.T, experts, generator=generator, device=device))
        return cls(
            x=normal(shape.T, hidden).requires_grad_(),
            dy=normal(shape.T, hidden),
            index=scores.topk(shape.top_k).indices,
            route=torch.rand(shape.T, shape.top_k, generator=generator, device=device).to(dtype).requires_grad_(),
            weights={name: normal(experts, n, k, scale=k**-0.5) for name, (k, n) in features.items()},
            lora_A={name: normal(pool, k, scale=k**-0.5) for name, (k, _) in features.items()},
            lora_B={name: normal(pool, n, scale=max(max(ranks), 1) ** -0.5) for name, (_, n) in features.items()},
            ranks=ranks,
        )

    def experts(self, implementation: str) -> Any:
        """OLMoE's experts module over the shared weights."""
        try:
            from transformers import OlmoeConfig
            from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
        except ImportError as error:
            raise Unavailable(f"transformers cannot be imported ({error}); pip install transformers") from error
        experts, _, hidden = self.weights["gate_up_proj"].shape
        config = OlmoeConfig(
            hidden_size=hidden,
            intermediate_size=self.weights["down_proj"].shape[2],
            num_experts=experts,
            num_experts_per_tok=self.index.shape[1],
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = OlmoeExperts(config)
        for name, weight in self.weights.items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module


class Routed(nn.Module):
    """An experts module as a function of x alone."""

    def __init__(self, experts: nn.Module, problem: ExpertsProblem) -> None:
        super().__init__()
        self.experts, self.index, self.route = experts, problem.index, problem.route

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.route)


def base(problem: ExpertsProblem, implementation: str) -> Provider:
    """The frozen experts, with the gradients of x and of the routing weights."""
    layer = Routed(problem.experts(implementation), problem)
    return Provider(problem, layer, 0, {"route": problem.route})  # type: ignore[arg-type]


def lrlora(problem: ExpertsProblem, padded: bool) -> Provider:
    """This library's adapter; ``padded`` gives every expert the rank of the largest, as masking would."""
    experts, ranks = problem.experts("grouped_mm"), problem.ranks
    most = max(ranks)
    held = [most] * len(ranks) if padded else ranks
    adapter = VariableRankLoRAExperts.from_experts(
        experts, max_rank=most, rank=0, pool_rank=-(-sum(held) // len(held)), lora_alpha=SCALING * most
    )
    adapter.set_ranks(held)
    rows = torch.cat([adapter.table.rows_of(e)[:rank] for e, rank in enumerate(ranks)])
    leaves: dict[str, Tensor] = {"route": problem.route}
    for name, pool in adapter.pools().items():
        with torch.no_grad():
            pool.lora_A[rows], pool.lora_B[rows] = problem.lora_A[name].float(), problem.lora_B[name].float()
        leaves |= {f"{name}.lora_A": pool.lora_A, f"{name}.lora_B": pool.lora_B}
    leaves["gate"] = adapter.table.gate

    def canonical(name: str, result: Tensor) -> Tensor:
        if name == "gate":
            return result.view(len(_PROJECTIONS), -1)[:, rows]
        return result[rows] if "lora" in name else result

    state = (adapter.table.train_ranks, adapter.table.demand)
    return Provider(problem, Routed(experts, problem), most, leaves, canonical, state)  # type: ignore[arg-type]


def peft(problem: ExpertsProblem, implementation: str, accelerated: bool = False) -> Provider:
    """PEFT's LoRA of expert parameters, which has one rank for all experts; on this library's ops if asked."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"PEFT cannot be imported ({error}); pip install peft") from error
    experts, rank = len(problem.ranks), problem.ranks[0]
    if len(set(problem.ranks)) > 1:
        raise Unavailable("PEFT has one rank for all experts")
    model = Routed(problem.experts(implementation), problem)
    config = LoraConfig(
        r=rank, lora_alpha=int(SCALING * rank), target_parameters=[f"experts.{name}" for name in _PROJECTIONS]
    )
    inject_adapter_in_model(config, model)
    if accelerated:
        accelerate_all(model)
    found = {n.rpartition(".lora_")[0]: None for n, _ in model.named_parameters() if ".lora_" in n}
    outer, inner = sorted(found, key=len)  # the outer wrapper is down_proj's
    leaves: dict[str, Tensor] = {"route": problem.route}
    for name, wrapper in (("gate_up_proj", inner), ("down_proj", outer)):
        layer: Any = model.get_submodule(wrapper)
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            lora_a.copy_(problem.lora_A[name])
            lora_b.copy_(problem.lora_B[name].view(experts, rank, -1).permute(2, 1, 0).reshape(lora_b.shape))
        leaves |= {f"{name}.lora_A": lora_a, f"{name}.lora_B": lora_b}

    def canonical(name: str, result: Tensor) -> Tensor:
        if not name.endswith("lora_B"):
            return result
        return result.view(result.shape[0], rank, experts).permute(2, 1, 0).reshape(experts * rank, -1)

    return Provider(problem, model, rank, leaves, canonical)  # type: ignore[arg-type]


BUILDERS: dict[str, Callable[[ExpertsProblem], Provider]] = {
    "base": lambda problem: base(problem, "grouped_mm"),
    "base, eager": lambda problem: base(problem, "eager"),
    "lrlora": lambda problem: lrlora(problem, padded=False),
    "lrlora, padded": lambda problem: lrlora(problem, padded=True),
    "PEFT": lambda problem: peft(problem, "grouped_mm"),
    "PEFT, accelerated": lambda problem: peft(problem, "grouped_mm", accelerated=True),
    "PEFT, eager": lambda problem: peft(problem, "eager"),
}


class ExpertsOracle:
    """What a provider must compute, in fp64, on some tokens: the rest of dy is zero while parity is checked."""

    def __init__(self, problem: ExpertsProblem) -> None:
        self.problem = problem
        tokens, device = problem.x.shape[0], problem.x.device
        self.tokens = torch.linspace(0, tokens - 1, min(_TOKENS_OF_PARITY[device.type], tokens), device=device).long()
        self.with_update, self.without = self._results(SCALING), self._results(0.0)

    def _results(self, scaling: float) -> dict[str, Tensor]:
        p, chosen = self.problem, self.tokens
        x, route = (t.detach()[chosen].double().requires_grad_() for t in (p.x, p.route))
        pools = {
            f"{name}.lora_{side}": pool[name].double().requires_grad_()
            for name in _PROJECTIONS
            for side, pool in (("A", p.lora_A), ("B", p.lora_B))
        }
        gates = torch.ones(2, sum(p.ranks), dtype=torch.float64, device=x.device, requires_grad=True)
        y = torch.zeros_like(x)
        ends = torch.tensor(p.ranks).cumsum(0).tolist()
        for expert in p.index[chosen].unique().tolist():
            own = slice(ends[expert] - p.ranks[expert], ends[expert])
            tokens, choice = (p.index[chosen] == expert).nonzero(as_tuple=True)
            rows = x[tokens]
            for name, gate in zip(_PROJECTIONS, gates, strict=True):
                lora_A, lora_B = pools[f"{name}.lora_A"][own], pools[f"{name}.lora_B"][own]
                rows = rows @ p.weights[name][expert].double().t() + scaling * (rows @ lora_A.t() * gate[own]) @ lora_B
                if name == "gate_up_proj":
                    left, right = rows.chunk(2, 1)
                    rows = nn.functional.silu(left) * right
            y = y.index_add(0, tokens, rows * route[tokens, choice, None])
        leaves = {"x": x, "route": route, **pools, "gate": gates}
        gradients = torch.autograd.grad(y, list(leaves.values()), p.dy[chosen].double(), allow_unused=True)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def check(self, provider: Provider) -> None:
        """Compare a provider's output and gradients; raises as ``compare`` does."""
        masked = torch.zeros_like(self.problem.dy)
        masked[self.tokens] = self.problem.dy[self.tokens]
        problem = copy.copy(self.problem)
        object.__setattr__(problem, "dy", masked)
        results = Provider(problem, provider.layer, provider.rank, provider.leaves, provider.canonical).results()  # type: ignore[arg-type]
        for name in ("y", "x", "route"):
            results[name] = results[name][self.tokens]
        expected = self.with_update if provider.rank else self.without
        compare({name: expected[name] for name in results}, results)
