"""Files and directories of a run: read before, and made before, hours are spent."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lrlora_ops.finetune.errors import CommandError


def read_text(path: Path, option: str = "--train") -> str:
    """The text of a file.

    Raises:
        CommandError: It is missing, empty, or no UTF-8 text.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text: convert it, or leave it out") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror}): give a text file with {option}") from None
    if "\0" in text:
        raise CommandError(f"{path} is a binary file: give a text file with {option}")
    if not text.strip():
        raise CommandError(f"{path} is empty: leave it out, or put text into it")
    return text


def prepare_output(directory: Path) -> None:
    """Make the directory, before hours are spent on what could not be saved.

    Raises:
        CommandError: It holds something already, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        occupied = any(directory.iterdir())
    except OSError as error:
        raise CommandError(f"{directory} cannot be written ({error.strerror}): choose another --output") from None
    if occupied:
        raise CommandError(f"{directory} is not empty: choose another --output, or empty it")
