"""Export: adapters in the formats of other libraries, never a file that computes something else."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrlora_ops._checkpoint import heed_umask

if TYPE_CHECKING:
    from lrlora_ops.adapters import Adapters

# Format -> module with write(adapters, directory) and check(adapters, directory) -> largest relative difference.
FORMATS = {name: f"lrlora_ops.integrations.{name}_export" for name in ("peft", "vllm", "sglang", "merged")}


def export(adapters: Adapters, directory: str | PathLike[str], format: str) -> float:
    """Write, read back and compare; see ``Adapters.export``."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if not adapters.modules:
        raise ValueError("the adapters are merged into the model, so there is nothing to export; save the model")
    form: Any = import_module(FORMATS[format])
    with _draft(Path(directory).absolute()) as draft:
        form.write(adapters, draft)
        difference: float = form.check(adapters, draft)
        heed_umask(draft)
    print(
        f"{directory}: {format}, read back; layers differ from the adapters' by at most {difference:.1g} of their norm"
    )
    return difference


@contextmanager
def _draft(directory: Path) -> Iterator[Path]:
    """A new folder beside the directory, whose files move there at the end, unless something raises."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory; give a new one")
    draft = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        yield draft
        if directory.exists():
            directory.rmdir()
        draft.replace(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
