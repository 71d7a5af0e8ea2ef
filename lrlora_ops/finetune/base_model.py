"""The demo's base model: a small Llama, and the tokenizer and texts that it is pretrained and tuned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lrlora_ops.finetune import corpus
from lrlora_ops.finetune.arm import Texts
from lrlora_ops.finetune.tokens import encode, sample, train_tokenizer

VOCAB_SIZE = 1024
SEQ_LEN = 128
FINE_TUNING_ROWS = 2  # of a batch, from each of the two texts


@dataclass(frozen=True)
class DemoTexts:
    """A tokenizer trained on the spot; tokens to pretrain on; texts to fine-tune on and to measure on."""

    tokenizer: Any
    source: Tensor
    tuning: Texts


def read_texts(characters: int, held_out_characters: int, console: Console) -> DemoTexts:
    """Python's library source, its reference text and its Unicode tables, as tokens.

    Args:
        characters: How much of each text is encoded to train on.
        held_out_characters: How much of each held-out text is measured on.
        console: Sizes and hashes are printed there.
    """
    source = corpus.library_source()
    reference, unicode = corpus.reference_text(source), corpus.unicode_lines()
    texts = (source, reference, unicode)
    for text in texts:
        console.print(f"  {text}", highlight=False)
    tokenizer = train_tokenizer(sample(source.train, min(characters, 2_000_000)), VOCAB_SIZE)
    held_out = {text.name: encode(tokenizer, sample(text.held_out, held_out_characters)) for text in texts}
    tokens, *tuning = (encode(tokenizer, sample(text.train, characters)).tokens for text in texts)
    train = [(stream, FINE_TUNING_ROWS) for stream in tuning]
    return DemoTexts(tokenizer, tokens, Texts(train, held_out, SEQ_LEN))


def small_llama() -> LlamaForCausalLM:
    """A Llama of 1 million parameters, of which every projection maps 128 features to 256 or 256 to 128.

    So equal sums of ranks are equal numbers of parameters, wherever the ranks are.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)
