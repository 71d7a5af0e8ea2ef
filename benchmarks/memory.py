"""Memory of training: what a step needs, and ``python -m benchmarks.memory``, what adapters of whole models hold.

The models are real ones by their sizes, on the meta device: nothing is allocated, and every byte is counted that a
forward, a backward and an optimizer step would hold.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.shapes import ExpertsShape, olmoe, qwen3
from lrlora_ops import DynamicRank, apply_lora
from lrlora_ops._storage import saved_bytes

TOKENS, MEAN_RANK, MAX_RANK = 4096, 16, 64


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator holds during the step beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = step()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


@dataclass(frozen=True)
class Held:
    """Bytes that training a model's adapters holds beside its frozen weights; ``saved`` is for backward, all layers."""

    adapters: int
    gradients: int
    optimizer: int
    saved: int


def model_on_meta(shape: ExpertsShape, layers: int) -> Any:
    """A bf16 model of transformers with these experts, 16 attention heads (32 for Qwen3) and no values."""
    import transformers

    common = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
    }
    config: Any
    if shape.model == "OLMoE":
        config = transformers.OlmoeConfig(
            intermediate_size=shape.intermediate, num_attention_heads=16, num_key_value_heads=16, **common
        )
    else:
        heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=shape.intermediate, **heads, **common)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, dtype=torch.bfloat16)


def adapt(model: nn.Module, arm: str) -> list[nn.Parameter]:
    """Give the experts the adapters of an arm of ``ARMS``, in place.

    Returns:
        The adapters' parameters.
    """
    if arm == "base":
        model.requires_grad_(False)
        return []
    if arm == "lrlora":
        method = DynamicRank(MEAN_RANK // 2, MEAN_RANK, MAX_RANK, total_steps=1000, interval=20)
        return apply_lora(model, method, "experts").parameters()
    from peft import LoraConfig, get_peft_model

    rank = MEAN_RANK if arm == "PEFT" else MAX_RANK
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    get_peft_model(model, LoraConfig(r=rank, target_modules=[], target_parameters=names))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Masking keeps every component that an expert could ever get.
ARMS = {
    "base": "frozen",
    "lrlora": f"lrlora, DR-LoRA of mean rank {MEAN_RANK}",
    "PEFT": f"PEFT, rank {MEAN_RANK} everywhere",
    "masked": f"PEFT at rank {MAX_RANK}, as masked DR-LoRA",
}


def held(shape: ExpertsShape, arm: str, layers: int) -> Held:
    """What an arm holds in a step of AdamW over ``shape.T`` tokens."""
    model = model_on_meta(shape, layers).train()
    parameters = adapt(model, arm)
    x = torch.empty(1, shape.T, shape.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    # The meta device has no autocast, which PEFT switches off.
    with patch.object(torch, "autocast", lambda *_, **__: nullcontext()):
        outputs: list[Tensor] = []
        resident = [*model.parameters(), *model.buffers()]
        saved = saved_bytes(lambda: outputs.append(model(inputs_embeds=x).last_hidden_state), resident)
        outputs[0].sum().backward()
    state: list[Any] = []
    if parameters:
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        state = [v for values in optimizer.state.values() for v in values.values() if v.dim()]
    return Held(_bytes(parameters), _bytes(p.grad for p in parameters), _bytes(state), saved)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def budget_bytes(shape: ExpertsShape, mean_rank: int, layers: int) -> int:
    """Of fp32 adapters whose ranks have this mean: a row of A and one of B per component and projection."""
    widths = (shape.hidden + 2 * shape.intermediate) + (shape.intermediate + shape.hidden)
    return 4 * layers * shape.num_experts * mean_rank * widths


def table() -> str:
    """Markdown: every arm on whole models."""
    lines = ["| model | adapters | A and B | gradients | AdamW | saved for backward |", "|---|---|---|---|---|---|"]
    for shape, layers, name in ((olmoe(TOKENS), 16, "OLMoE-1B-7B"), (qwen3(TOKENS), 48, "Qwen3-30B-A3B")):
        for arm, text in ARMS.items():
            one, two = (astuple(held(shape, arm, count)) for count in (1, 2))  # all layers are alike
            sizes = [first + (layers - 1) * (second - first) for first, second in zip(one, two, strict=True)]
            lines.append(f"| {name} | {text} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"GB (1e9 bytes), {TOKENS} tokens, bf16 model, fp32 adapters on its experts; counted on the meta device\n")
    print(table())
