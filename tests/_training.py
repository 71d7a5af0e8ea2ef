"""A tiny dense model, a dataset, and Hugging Face's Trainer over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lrlora_ops import (
    Adapters,
    DynamicRank,
    FixedRank,
    LearnedRank,
    SincUpdate,
    VariableRankLoRALinear,
    apply_lora,
)
from tests._moe import tiny

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # with 0.02 a broken adapter moves the logits by less than rounding
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS = 10
# In STEPS steps: LearnedRank freezes after step 8; DynamicRank grows in steps 1, 3, 5 and 7 and freezes then.
LEARNED = LearnedRank(3, 6, lr=0.5)
DYNAMIC = DynamicRank(initial_rank=1, target_rank=3, max_rank=6, interval=2, warmup=0.1)


def llama(tied: bool = False, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | sizes, tie_word_embeddings=tied))


# A model and what apply_lora gets for it.
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "fixed": (llama, {"all-linear": FixedRank(3)}),
    "learned": (llama, {"all-linear": LEARNED}),
    "functions of a kind": (llama, {"all-linear": SincUpdate(2, num_coefficients=3, share="type")}),
    "fixed experts": (lambda: tiny("qwen3_moe"), {"experts": FixedRank(3)}),
    "learned experts": (lambda: tiny("mixtral"), {"experts": LEARNED}),
    "grown experts, learned layers": (lambda: tiny("qwen3_moe"), {"experts": DYNAMIC, "all-linear": LEARNED}),
}


def adapted(case: str, **options: Any) -> tuple[nn.Module, Adapters]:
    """The model of a case with its adapters, which are the same each time."""
    make, methods = CASES[case]
    model = make()
    torch.manual_seed(3)
    return model, apply_lora(model, methods, **options)


def priced() -> tuple[nn.Module, Adapters]:
    """A model whose ranks have a price each."""
    model = llama()
    torch.manual_seed(3)
    adapters = apply_lora(model, LearnedRank(3, 6, lr=0.5, penalty=0.05), "all-linear")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, adapters


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, VariableRankLoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, 40, (rows, 12), generator=torch.Generator().manual_seed(0))


class Text(torch.utils.data.Dataset):
    """24 rows of 10 tokens, of which 5 to 10 count for the loss."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.randint(3, 40, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": torch.where(torch.arange(10) < index % 6, -100, row)}


def trainer(
    model: nn.Module, adapters: Adapters, path: Path, callbacks: Any = (), **settings: Any
) -> transformers.Trainer:
    """With ``adapters.callback()``, and nothing else that it needs."""
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        learning_rate=5e-3,
        use_cpu=not torch.cuda.is_available(),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
        }
        | settings,
    )
    callbacks = [*callbacks, adapters.callback()]
    data = {"train_dataset": Text(), "eval_dataset": Text()}
    return transformers.Trainer(model=model, args=arguments, callbacks=callbacks, **data)


class Statistics:
    """What the methods were given, step by step: sensitivities and demands of all tables."""

    def __init__(self, adapters: Adapters) -> None:
        self.seen: list[list[Tensor]] = []
        policy = adapters.policies[0]
        step, tables = policy.step, list(adapters.tables.values())

        def watch(loss: Tensor | None = None) -> None:
            self.seen.append([t.clone() for table in tables for t in (table.sensitivity, table.routed)])
            step(loss)

        policy.step = watch  # type: ignore[method-assign]


def state_of(model: nn.Module, adapters: Adapters) -> dict[str, Any]:
    """All that a run has learned: weights, ranks, and what the methods remember."""
    state: dict[str, Any] = dict(model.state_dict())
    for index, policy in enumerate(adapters.policies):
        state |= {f"{index}.{key}": value for key, value in policy.state_dict().items()}
    return state


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key
