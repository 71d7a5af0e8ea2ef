"""Tiles that the user's GPU has chosen: the file that ``lrlora tune`` writes, and whether it holds for this machine.

One JSON: device name -> tables, each with versions, a hash of these kernels' source, and tiles. What is of another
version or source is not used, for its times say nothing of the code that runs.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton

# Kernel, capacity of the rank (few or many rows for grouped_gemm), bytes of an element, bucket of rows per expert, and
# the widths of the large operands; see ``_configs.tile_for`` for the sinc kernels.
Key = tuple[str, int, int, int, tuple[int, ...]]
Fields = tuple[int, int, int, int, int]  # of a Tile
VARIABLE = "LRLORA_CACHE_DIR"
_MOST_TABLES = 4  # of one device: environments and branches between which somebody changes to and fro


class UnusableTiles(Exception):
    """There are tiles for this GPU which cannot be used; the message says why, without the path."""


@dataclass(frozen=True)
class Identity:
    """What the times of tiles depend on besides the GPU: versions, and the source of the kernels."""

    torch: str
    triton: str
    kernels: str

    @classmethod
    def here(cls) -> "Identity":
        return cls(torch.__version__, triton.__version__, source_hash())


_NAMES = tuple(field.name for field in fields(Identity))


def source_hash(folder: Path = Path(__file__).parent) -> str:
    """Of all files of the kernels but those that a tile is looked up in."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("_measured.py", "_user_tiles.py"):
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def path() -> Path:
    """``tiles.json`` in the folder of ``LRLORA_CACHE_DIR``, else in ``lrlora_ops`` where this system keeps caches."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder) / "tiles.json"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification has it
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "lrlora_ops" / "tiles.json"


def load(device: str, identity: Identity) -> dict[Key, Fields]:
    """The tiles of a device; none if nobody has asked it.

    Raises:
        UnusableTiles: The file is damaged, or all tiles for the device are of another version or source.
    """
    try:
        tables = {Identity(*(table[name] for name in _NAMES)): table["tiles"] for table in _read().get(device, [])}
        if identity in tables:
            return dict(map(_item, tables[identity]))
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableTiles(f"they are damaged ({type(error).__name__}: {error})") from error
    if not tables:
        return {}
    changed = [
        f"{name} {old}, and here is {new}" if name != "kernels" else "another source of the kernels"
        for name, old, new in zip(_NAMES, astuple(list(tables)[-1]), astuple(identity), strict=True)
        if old != new
    ]
    raise UnusableTiles(f"they are of {'; of '.join(changed)}")


def save(device: str, identity: Identity, tiles: Mapping[Key, Fields]) -> None:
    """Put tiles of a device into the file, at once or not at all; those that are there for other keys stay.

    So do those of other devices, and of this one the last few of other versions or sources. What is damaged is
    replaced. Several processes may save at once: each adds to what the others have, and a reader sees a whole file.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = {"dir": target.parent, "prefix": target.stem, "suffix": ".tmp", "delete": False}
    with _alone(target.with_suffix(".lock")), tempfile.NamedTemporaryFile("w", **new) as file:
        try:
            json.dump(_with(_read_usable(), device, identity, tiles), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time. The lock goes with the process that holds it, whatever that dies of; its file stays."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _with(content: dict[str, Any], device: str, identity: Identity, tiles: Mapping[Key, Fields]) -> dict[str, Any]:
    """The content of the file with these tiles in it."""
    tables = content.get(device)
    tables = tables if isinstance(tables, list) else []
    kept: dict[Key, Fields] = {}
    for table in tables:
        if _is_of(table, identity):
            with suppress(KeyError, TypeError, ValueError):  # a damaged table has no tile worth keeping
                kept = dict(map(_item, table["tiles"]))
    names = ("kernel", "capacity", "itemsize", "rows", "features")
    rows = [dict(zip(names, key, strict=True)) | {"tile": tile} for key, tile in sorted({**kept, **tiles}.items())]
    others = [table for table in tables if not _is_of(table, identity)]
    return content | {device: [*others[1 - _MOST_TABLES :], asdict(identity) | {"tiles": rows}]}


def _read_usable() -> dict[str, Any]:
    try:
        return _read()
    except UnusableTiles:
        return {}


def _is_of(table: Any, identity: Identity) -> bool:
    return isinstance(table, dict) and all(table.get(name) == value for name, value in asdict(identity).items())


def _read() -> dict[str, Any]:
    try:
        content = json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnusableTiles(f"they cannot be read ({type(error).__name__}: {reason})") from error
    if not isinstance(content, dict):
        raise UnusableTiles("they are damaged (no table of devices)")
    return content


def _item(row: Mapping[str, Any]) -> tuple[Key, Fields]:
    """A row of the file, once it is one that a kernel can be launched with."""
    key = (row["kernel"], row["capacity"], row["itemsize"], row["rows"], tuple(row["features"]))
    if not isinstance(key[0], str) or not all(isinstance(value, int) for value in (*key[1:4], *key[4])):
        raise ValueError(f"{key} is no kernel and sizes")
    m, n, r, warps, stages = row["tile"]
    powers = all(isinstance(side, int) and side >= 16 and side & (side - 1) == 0 for side in (m, n, r))
    # A grid divides the width of U by block_r, whose larger tiles would cover nothing.
    if not powers or warps not in (2, 4, 8) or stages not in range(1, 9) or (key[0] != "grouped_gemm" and r > key[1]):
        raise ValueError(f"{row['tile']} is no tile of {key[0]}")
    return key, (m, n, r, warps, stages)
