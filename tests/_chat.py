"""What docs/training.md takes for granted: a tiny Mixture-of-Experts chat model, and a file of conversations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests._moe import COMMON, MODELS
from tests._pages import blocks

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(path: Path) -> None:
    """A folder with Qwen3-MoE of random weights, over bytes and three special tokens, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(fast), "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model("qwen3_moe", **COMMON | MODELS["qwen3_moe"] | sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


def save_chats(path: Path) -> None:
    """The page's conversations, some dozen times, with answers of several lengths."""
    chats = [json.loads(line) for line in blocks("training", "json")[0].code.splitlines()] * 12
    for index, chat in enumerate(chats):
        chat["messages"][-1]["content"] += " Good." * (index % 3)
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
