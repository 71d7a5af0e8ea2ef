"""The demo's texts: real, split without overlap, the same every time."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest

from lrlora_ops.finetune import corpus
from lrlora_ops.finetune.errors import CommandError


@pytest.fixture(scope="module")
def source():
    return corpus.library_source()


def paragraphs(documents):
    return {paragraph.strip() for document in documents for paragraph in document.split("\n\n")} - {""}


def check_split(text, share):
    """Both sides hold text, the held-out side about this share of it."""
    sizes = [sum(map(len, side)) for side in (text.train, text.held_out)]
    assert share / 3 < sizes[1] / sum(sizes) < 3 * share
    assert not set(text.train) & set(text.held_out)


def test_library_source_is_split_by_file_without_duplicates(source):
    check_split(source, 0.05)
    assert len(set(source.train)) == len(source.train)
    assert any("def heappush(" in document for document in (*source.train, *source.held_out))


def test_reference_text_shares_no_paragraph(source):
    text = corpus.reference_text(source)
    check_split(text, 0.1)
    assert not paragraphs(text.train) & paragraphs(text.held_out)


def test_reference_text_is_not_part_of_the_pretraining(source):
    long = {p for p in paragraphs(corpus.reference_text(source).train) if len(p) > 400}
    assert long
    assert not [p for p in long if any(p in document for document in source.train)]


def test_docstrings_stand_in_for_missing_reference_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as if it were not installed
    train = (
        '"""A module.\n\nShared paragraph.\n"""\ndef f():\n    """A function."""\n',
        'class C:\n    """A class."""\n    async def g(self):\n        """A method."""\n',
    )
    held_out = ('"""Another module.\n\nShared paragraph.\n"""\ndef f():\n    """A function."""\n',)
    text = corpus.reference_text(corpus.Corpus("source", train, held_out))
    assert text.name == "docstrings"
    assert sorted(text.train) == ["A class.", "A function.", "A method.", "A module.\n\nShared paragraph."]
    assert text.held_out == ("Another module.",)


def test_unicode_lines_say_what_the_tables_say():
    text = corpus.unicode_lines()
    check_split(text, 0.1)
    lines = [line for block in (*text.train, *text.held_out) for line in block.splitlines()]
    assert len(set(lines)) == len(lines) > 20_000
    assert "00E0;LATIN SMALL LETTER A WITH GRAVE;Ll;L" in lines
    code, name, category, _ = lines[12345].split(";")
    assert (unicodedata.name(chr(int(code, 16))), unicodedata.category(chr(int(code, 16)))) == (name, category)


def test_a_corpus_is_the_same_every_time_and_shows_its_hash():
    text, again = (corpus.library_source(Path(json.__file__).parent) for _ in range(2))
    assert again == text
    assert str(again) == str(text)
    changed = corpus.Corpus(text.name, text.train, (*text.held_out[:-1], text.held_out[-1] + " "))
    assert str(changed) != str(text)


def test_a_library_without_source_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CommandError, match="run with a Python that ships"):
        corpus.library_source(tmp_path)
