"""The pages of the documentation as tests see them: blocks of code in order, files that they make, commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NAMES_A_FILE = re.compile(r"# ([\w/]+\.py)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. ``file`` is the path that its first line names, if that is all that it does."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def file(self) -> str | None:
        named = _NAMES_A_FILE.match(self.code)
        return named[1] if named else None

    def run(self, scope: dict[str, Any]) -> None:
        """Execute it; a traceback has the page's name and lines."""
        exec(compile("\n" * self.line + self.code, self.page, "exec"), scope)


def blocks(page: str, language: str) -> list[Block]:
    """Those of a page, by its name without the ending, in a language."""
    path = PAGES[page]
    text = path.read_text()
    found = (Block(path, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _FENCED.finditer(text))
    return [block for block in found if block.language == language]


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "console") for line in block.code.splitlines()]


def write_files(page: str, folder: Path) -> None:
    """Each block that names a file goes there, at the end of what is there already."""
    for block in blocks(page, "python"):
        if block.file:
            with (folder / block.file).open("a") as file:
                file.write(f"\n\n{block.code}" if file.tell() else block.code)


def run_commands(listed: Sequence[str], folder: Path) -> list[str]:
    """What each printed, in order."""
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    printed = []
    for command in listed:
        run = subprocess.run(command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout + run.stderr
        printed.append(run.stdout)
    return printed
