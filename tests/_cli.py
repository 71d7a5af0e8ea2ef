"""What the tests of the command share: small models, a text, the shape of an error."""

import re

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEXT = "".join(f"line {index}: the ranks of {index % 7} layers are learned\n" for index in range(200))
TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, initializer_range=0.3, **sizes, **TOKENS))


def qwen3_moe():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(max_position_embeddings=64, initializer_range=0.3, **sizes, **experts, **TOKENS)
    )


def gpt2_without_linear_layers():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **TOKENS))


def assert_one_line(result, words, code=2):
    """One line on stderr with these words, this exit code, and no traceback."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lrlora: ")
    assert re.search(words, lines[0]), lines[0]


def forget(adapters, directory):
    """Stands in for a load that does nothing."""
