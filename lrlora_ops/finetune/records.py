"""Files of examples, a JSON object on each line: texts, prompts with completions, conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.files import read_text
from lrlora_ops.finetune.tokens import EncodedExamples

KINDS = {"text": ("text",), "prompt and completion": ("prompt", "completion"), "messages": ("messages",)}
_WANTED = "'text', or 'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True)
class Record:
    """One line of a file.

    Attributes:
        kind: A key of ``KINDS``.
        values: The object.
        place: File and line, for messages.
    """

    kind: str
    values: dict[str, Any]
    place: str


def read_records(path: Path) -> list[Record]:
    """The objects of a file of JSON lines, of one kind.

    Raises:
        CommandError: It cannot be read, or a line of it cannot be used; with file, line and key.
    """
    records: list[Record] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            records.append(_record(line, f"{path}, line {number}"))
            if records[-1].kind != records[0].kind:
                raise CommandError(
                    f"{records[-1].place} has {records[-1].kind}, the lines before it {records[0].kind}: "
                    "put each kind into a file of its own"
                )
    return records


def _record(line: str, place: str) -> Record:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise CommandError(f"{place} is not JSON ({error}); it must be an object with {_WANTED}") from None
    if not isinstance(values, dict):
        raise CommandError(f"{place} is a {type(values).__name__}; it must be an object with {_WANTED}")
    kind = next((kind for kind, keys in KINDS.items() if all(key in values for key in keys)), None)
    if kind is None:
        wanted = [key for keys in KINDS.values() for key in keys if key not in values]
        near = [(key, match) for key in values for match in get_close_matches(key, wanted, 1)]
        guess = f"; did you mean {near[0][1]!r} by {near[0][0]!r}?" if near else ""
        raise CommandError(f"{place} has {', '.join(map(repr, values)) or 'no key'}; it must have {_WANTED}{guess}")
    for key in KINDS[kind]:
        if key == "messages":
            _check_messages(values[key], place)
        elif not isinstance(values[key], str) or (key != "prompt" and not values[key]):
            raise CommandError(f"{place}: {key} is {values[key]!r}; it must be text that is not empty")
    return Record(kind, values, place)


def _check_messages(messages: Any, place: str) -> None:
    sound = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not sound:
        raise CommandError(f"{place}: messages must be a list of objects with 'role' and 'content'")
    if not any(message["role"] == "assistant" for message in messages):
        raise CommandError(f"{place}: no message has the role 'assistant', so there is nothing to learn; leave it out")


def encode_records(tokenizer: Any, records: Sequence[Record], seq_len: int) -> tuple[EncodedExamples, int]:
    """Prompts with completions, or conversations, as tokens, of which only what the model is to say is predicted.

    Args:
        tokenizer: With a chat template, for messages.
        records: Not of the kind text.
        seq_len: Examples are cut after as many tokens; those of which nothing to predict is left, are dropped.

    Returns:
        The examples, and how many of the records were cut or dropped.

    Raises:
        CommandError: The tokenizer has no chat template, or one that does not tell what the assistant says.
    """
    whole = [_encode_chat(tokenizer, r) if r.kind == "messages" else _encode_pair(tokenizer, r) for r in records]
    cut = [example[:seq_len] for example in whole]
    kept = [example for example in cut if bool((example[1:] >= 0).any())]
    predicted = [example[1:][example[1:] >= 0].tolist() for example in kept]
    num_bytes = sum(len(tokenizer.decode(tokens).encode()) for tokens in predicted)
    return EncodedExamples(kept, num_bytes), sum(len(example) > seq_len for example in whole)


def _encode_pair(tokenizer: Any, record: Record) -> Tensor:
    """The completion ends with the end-of-text token, so that the model learns to stop."""
    prompt, completion = record.values["prompt"], record.values["completion"]
    text = prompt + completion + (tokenizer.eos_token or "")
    return _encode(tokenizer, text, [(len(prompt), len(text))], add_special_tokens=True)


def _encode_chat(tokenizer: Any, record: Record) -> Tensor:
    if not tokenizer.chat_template:
        raise CommandError(
            f"{record.place} has messages, but the model's tokenizer has no chat template: choose a chat model, or "
            "give prompt and completion"
        )
    messages, tools = record.values["messages"], record.values.get("tools")
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return _marked(encoded["input_ids"], encoded["assistant_masks"])

    def rendered(messages: list[Any], **options: bool) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    text, said = rendered(messages), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = rendered(messages[:index], add_generation_prompt=True), rendered(messages[: index + 1])
            if not (text.startswith(end) and end.startswith(start)):
                raise CommandError(
                    f"{record.place}: the chat template changes what came before message {index}, so what the "
                    "assistant says cannot be told apart; put {% generation %} around it in the template"
                )
            said.append((len(start), len(end)))
    return _encode(tokenizer, text, said, add_special_tokens=False)


def _encode(tokenizer: Any, text: str, said: Sequence[tuple[int, int]], **options: bool) -> Tensor:
    """The tokens of a text, of which those are to be predicted that begin in one of these spans of characters."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    return _marked(encoded["input_ids"], [any(start <= begin < end for start, end in said) for begin in begins])


def _marked(tokens: Sequence[int], predicted: Sequence[bool | int]) -> Tensor:
    return torch.tensor([t if p else ~t for t, p in zip(tokens, predicted, strict=True)], dtype=torch.int64)
