"""Linear layers whose weight another module reads instead of calling them, so that an adapter there may do nothing.

``nn.MultiheadAttention`` hands ``self.out_proj.weight`` to a fused function, and so do Mamba's mixers where their
kernels are installed. It shows in their code: a method that ``forward`` reaches uses ``self.<layer>.weight`` as a
value. Asking for its dtype, say, is no such use.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_ABOUT = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "size", "dim", "numel", "element_size"}
_ASKS = {"isinstance", "hasattr", "getattr", "type", "id"}


def layers_read_past(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """By the id of the layer: the class that reads its weight, and whether that calls the layer elsewhere.

    A class whose source cannot be had tells nothing, nor does code outside of the class.
    """
    found: dict[int, tuple[str, bool]] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # call_every_layer has it call them
            continue
        cls: Any = type(module)
        for path, called in _reads(cls):
            try:
                layer = module.get_submodule(path)
            except AttributeError:  # not in this configuration
                continue
            if hasattr(layer, "in_features"):
                found[id(layer)] = (cls.__name__, called)
    return found


@cache
def _reads(cls: Any) -> tuple[tuple[str, bool], ...]:
    """The submodules whose weight the class's forward reads, and whether it calls them, too."""
    read: set[str] = set()
    called: set[str] = set()
    reached: set[Any] = set()
    waiting = [_method(cls, "forward")]
    while waiting:
        owner, function = waiting.pop()
        if function in reached:
            continue
        reached.add(function)
        for node, parent in _code(function):
            if _is_super(node):
                waiting.append(_method(cls, node.attr, after=owner))
            path = _path(node)
            if path is None:
                continue
            waiting.append(_method(cls, path))
            if _only_asks(parent):
                continue
            if isinstance(parent, ast.Call):
                called.add(path)
            if path.endswith(".weight"):
                read.add(path.removesuffix(".weight"))
    return tuple((path, path in called) for path in sorted(read))


def _method(cls: type, name: str, after: type | None = None) -> tuple[type | None, Any]:
    """A method of the class, or the next one behind that of ``after``, and who defines it; None if there is none."""
    order = cls.__mro__[: cls.__mro__.index(nn.Module)] if nn.Module in cls.__mro__ else cls.__mro__
    for owner in order[order.index(after) + 1 if after else 0 :]:
        if inspect.isfunction(vars(owner).get(name)):
            return owner, inspect.unwrap(vars(owner)[name])
    return None, None


def _code(function: Any) -> Iterator[tuple[Any, ast.AST]]:
    """Each name or attribute that a function reads, with the code right around it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(getattr(node, "ctx", None), ast.Load):
                yield node, parent


def _is_super(node: Any) -> bool:
    inner = getattr(getattr(node, "value", None), "func", None)
    return isinstance(node, ast.Attribute) and isinstance(inner, ast.Name) and inner.id == "super"


def _path(node: Any) -> str | None:
    """``a.b`` for the code ``self.a.b``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "self" else None


def _only_asks(parent: ast.AST) -> bool:
    """Whether what stands in this code is asked about, and takes no part in the result."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _ABOUT
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in _ASKS
    return isinstance(parent, ast.Compare)
