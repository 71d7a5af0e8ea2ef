"""Real text that is on every machine with Python: its library's source, its reference text, its Unicode tables."""

from __future__ import annotations

import ast
import hashlib
import importlib
import random
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrlora_ops.finetune.errors import CommandError

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",  # not everywhere, or not the library
    "site-packages", "dist-packages", "__pycache__",
    "pydoc_data", "encodings",  # the reference text itself, and tables of Unicode names
}  # fmt: skip
UNICODE_BLOCK_LINES = 64
GENERATED_NAMES = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "HANGUL SYLLABLE ")


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind of text, split so that nothing held out is also trained on."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.name}: {_size(self.train)} to train, {_size(self.held_out)} held out, "
            f"sha256 {_digest(self.train)} / {_digest(self.held_out)}"
        )


def _size(documents: Iterable[str]) -> str:
    return f"{sum(len(document.encode()) for document in documents) / 1e3:,.0f} kB"


def _digest(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:12]


def _split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """``(train, held_out)``: the same every time, at least one document on each side."""
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    chosen = set(random.Random(0).sample(range(len(documents)), count))
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def library_source(folder: Path | None = None) -> Corpus:
    """Source files of Python's standard library; 5% of the files are held out.

    Raises:
        CommandError: ``folder`` (default: this Python's library) has no source, as when it is zipped.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.rglob("*.py"))
    paths = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1])]
    texts = dict.fromkeys(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    texts.pop("", None)
    if len(texts) < 2:
        raise CommandError(
            f"{folder} holds no Python source to train on; run with a Python that ships its library as .py files"
        )
    train, held_out = _split(list(texts), 0.05)
    return Corpus("library source", tuple(train), tuple(held_out))


def reference_text(source: Corpus) -> Corpus:
    """The English of ``help()``'s topics; 10% of the topics are held out.

    A paragraph that also occurs in training is taken out of the held-out topics. A Python without
    ``pydoc_data`` gives its docstrings instead, split like the files of ``source`` that they are in; the name says so.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        train, held_out = _docstrings(source.train), _docstrings(source.held_out)
        name = "docstrings"
    else:
        train, held_out = _split([topics[name] for name in sorted(topics)], 0.1)
        name = "reference text"
    return Corpus(name, tuple(train), tuple(_without_paragraphs_of(train, held_out)))


def _without_paragraphs_of(train: list[str], held_out: list[str]) -> list[str]:
    seen = {paragraph.strip() for document in train for paragraph in document.split("\n\n")}
    kept = ["\n\n".join(p for p in document.split("\n\n") if p.strip() not in seen) for document in held_out]
    return [document for document in kept if document]


def _docstrings(files: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in files:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
                found[docstring] = None
    return list(found)


def unicode_lines() -> Corpus:
    """Lines like ``00E0;LATIN SMALL LETTER A WITH GRAVE;Ll;L``; 10% of the blocks of 64 lines are held out.

    Characters whose name is only a number or a spelled sound, Chinese and Korean ones mostly, are left out.
    """
    lines = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        name = unicodedata.name(character, "")
        if name and not name.startswith(GENERATED_NAMES):
            lines.append(f"{code:04X};{name};{unicodedata.category(character)};{unicodedata.bidirectional(character)}")
    starts = range(0, len(lines), UNICODE_BLOCK_LINES)
    blocks = ["\n".join(lines[start : start + UNICODE_BLOCK_LINES]) + "\n" for start in starts]
    train, held_out = _split(blocks, 0.1)
    return Corpus("Unicode lines", tuple(train), tuple(held_out))
