"""``lrlora tune``: the fastest tiles of the kernels for a model's shapes, found on this machine's GPU and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.planned import distinct_layers
from lrlora_ops.finetune.speed import usable_cores
from lrlora_ops.methods import FixedRank, Method, SincUpdate
from lrlora_ops.plan import Layer

if find_spec("triton"):
    from lrlora_ops.kernels import _user_tiles
    from lrlora_ops.kernels._configs import Tile, device_name
    from lrlora_ops.tuning.calls import Call, layer_calls
    from lrlora_ops.tuning.search import Found, Gpu, Judge, search

_MOST_JOBS = 16


@dataclass(frozen=True)
class TuneSettings:
    """The options of ``lrlora tune``; see its help.

    Raises:
        CommandError: A number is out of its range.
    """

    model: Path
    tokens: int
    rank: int
    targets: tuple[str, ...]
    dtype: str
    method: str = "fixed"
    again: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("tokens", self.tokens, 2), ("rank", self.rank, 1), ("jobs", self.jobs, 1)):
            if value is not None and value < least:
                raise CommandError(f"--{name} is {value}; it must be at least {least}")

    def adapter(self) -> Method:
        """A method that launches what theirs does: a SincUpdate's kernels are its own, all others have the same."""
        return SincUpdate(self.rank) if self.method == "sinc" else FixedRank(self.rank)


def tune_model(settings: TuneSettings, console: Console) -> None:
    """Print each tile that is found, and keep it at once: a run that is stopped loses nothing.

    Raises:
        CommandError: There is no GPU, the model cannot be read, or a layer does not fit the GPU.
    """
    _require_gpu()
    layers = distinct_layers(settings.model, settings.targets, settings.tokens, settings.dtype)
    console.print(
        f"{device_name()}: layers of {len(layers)} sizes, {settings.tokens:,} tokens, rank {settings.rank}; "
        f"tiles go to {_user_tiles.path()}",
        highlight=False,
        soft_wrap=True,
    )
    began, changed = time.monotonic(), 0
    identity, before = _user_tiles.Identity.here(), _known(console)
    known = () if settings.again else tuple(before)
    _user_tiles.save(device_name(), identity, {})  # a folder that cannot be written to is said before the work

    def found(key: _user_tiles.Key, result: Found, shipped: Tile) -> None:
        nonlocal changed
        _user_tiles.save(device_name(), identity, {key: astuple(result.tile)})
        changed += result.tile != shipped
        console.print(f"{time.monotonic() - began:5.0f} s  {described(key, result)}", highlight=False, soft_wrap=True)

    try:
        with Gpu(settings.jobs or min(usable_cores(), _MOST_JOBS)) as gpu:
            tuned = tune_layers(layers, settings.adapter(), gpu.device, gpu, known, found)
    except torch.OutOfMemoryError as error:
        raise CommandError("the GPU's memory is full: lower --tokens; what was found so far is kept") from error
    console.print(
        f"{tuned} tiles tuned, {changed} of them other than shipped; runs on this GPU take them from now on"
        if tuned
        else "nothing is left to tune: all shapes have been tuned before; --again tunes them anew",
        highlight=False,
        soft_wrap=True,
    )


def tune_layers(
    layers: Iterable[tuple[nn.Module, Layer]],
    method: Method,
    device: torch.device,
    judge: Judge,
    known: Iterable[_user_tiles.Key],
    found: Callable[[_user_tiles.Key, Found, Tile], None],
) -> int:
    """Search the tile of everything that a step of the layers launches.

    Args:
        layers: Modules, which may be on the meta device, and their sizes.
        method: Of every layer.
        device: Where the layers run.
        judge: What fits, and how long it takes.
        known: What is not searched again.
        found: Called with each result at once, and the shipped tile.

    Returns:
        The number of results.

    Raises:
        CommandError: A layer cannot have the rank.
    """
    done = set(known)
    before = len(done)
    for module, layer in layers:
        asking: dict[_user_tiles.Key, tuple[Tile, list[Call]]] = {}
        try:
            calls = layer_calls(module, layer, method, device)
        except ValueError as error:
            raise CommandError(f"{layer.name} cannot have an adapter of rank {method.max_rank}: {error}") from error
        for call in calls:
            for key, shipped in call.keys().items():
                asking.setdefault(key, (shipped, []))[1].append(call)
        for key, (shipped, of_key) in asking.items():
            if key not in done:
                found(key, search(key, shipped, of_key, judge), shipped)
                done.add(key)
    return len(done) - before


def described(key: _user_tiles.Key, result: Found) -> str:
    """A key's result in a line."""
    kernel, capacity, itemsize, rows, features = key
    widths = "x".join(map(str, features))
    if kernel in ("sinc_weight", "sinc_gradients"):
        widths = "{} columns, {} coefficients".format(*features)
    where = f"{rows}+ rows, {widths}, {itemsize} bytes"
    if kernel != "grouped_gemm":
        where = f"rank to {capacity}, {where}"
    tile = result.tile
    what = f"{tile.block_m}x{tile.block_n}x{tile.block_r}, {tile.num_warps} warps, {tile.num_stages} stages"
    times = f"{1e3 * result.seconds:.4f} ms, shipped {1e3 * result.shipped_seconds:.4f} ms"
    return f"{kernel} ({where}): {what}: {times}; {result.fitting} of {result.tried} tiles fit"


def _known(console: Console) -> dict[_user_tiles.Key, _user_tiles.Fields]:
    """The tiles that hold for this machine; those that do not are said, and replaced."""
    try:
        return _user_tiles.load(device_name(), _user_tiles.Identity.here())
    except _user_tiles.UnusableTiles as error:
        console.print(f"tiles that were found before are replaced: {error}", highlight=False, soft_wrap=True)
        return {}


def _require_gpu() -> None:
    elsewhere = "tiles are timed on the GPU that trains: run lrlora tune there (lrlora plan and doctor need no GPU)"
    if not torch.cuda.is_available():
        raise CommandError(f"torch {torch.__version__} sees no GPU here; {elsewhere}")
    if not find_spec("triton"):
        raise CommandError("triton is not installed, whose kernels are tuned: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CommandError("TRITON_INTERPRET=1 runs the kernels without the GPU: unset it")
