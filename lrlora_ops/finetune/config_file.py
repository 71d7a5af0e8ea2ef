"""A file of settings and the options over it, checked; what is wrong is told with its place and its fix."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lrlora_ops.finetune.config import METHOD_MODELS, FineTuneConfig, option_paths
from lrlora_ops.finetune.errors import CommandError
from lrlora_ops.finetune.files import read_text

KeyPath = tuple[str | int, ...]


def read_config(file: Path | None, options: Mapping[str, Any]) -> FineTuneConfig:
    """The settings of a file, those options over it that are not None, and defaults.

    An option ``method`` other than the file's replaces that method with all its settings.

    Args:
        file: YAML, or None.
        options: By the names of ``option_paths``.

    Raises:
        CommandError: The file cannot be read, or a setting is unknown, missing or out of its range; with file, line
            and key, or the option.
    """
    values, lines = _read_yaml(file) if file else ({}, {})
    paths = option_paths()
    given = {paths[name]: value for name, value in options.items() if value is not None}
    try:
        return FineTuneConfig.model_validate(_merged(values, given))
    except ValidationError as error:
        flags: dict[KeyPath, str] = {path: "--" + name.replace("_", "-") for name, path in paths.items()}
        places = _Places(file, lines, flags, set(given))
        first, *others = error.errors()
        more = f" ({len(others)} more mistake{'s' if others[1:] else ''} after it)" if others else ""
        raise CommandError(_explain(first, places) + more) from None


def _merged(values: dict[str, Any], given: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    merged = dict(values)
    method = merged.get("method", {})
    chosen = given.get(("method", "name"))
    if isinstance(method, dict) and (method or any(path[0] == "method" for path in given)):
        if chosen is not None and chosen != method.get("name", "learned"):
            method = {}
        merged["method"] = (method or {"name": "learned"}) | {
            path[1]: value for path, value in given.items() if path[0] == "method"
        }
    return merged | {path[0]: value for path, value in given.items() if path[0] != "method"}


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The values, and the line of each key."""
    text = read_text(file, "--config")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(file, root))
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise CommandError(f"{file}, line {line}: not YAML ({error.problem}); put it right") from None
    except yaml.YAMLError as error:
        raise CommandError(f"{file} is not YAML ({error}); put it right") from None
    if not isinstance(values, dict):
        raise CommandError(f"{file} is a {type(values).__name__}; it must be a list of lines such as 'steps: 300'")
    return values, lines


def _lines(file: Path, node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.value in seen:
            raise CommandError(f"{file}, line {line}: {key.value} is there twice; leave one of them out")
        seen.add(key.value)
        yield (*path, key.value), line
        yield from _lines(file, value, (*path, key.value))
    for index, item in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
        yield (*path, index), item.start_mark.line + 1
        yield from _lines(file, item, (*path, index))


class _Places:
    """Where a setting was given: an option, or a line of the file."""

    def __init__(
        self, file: Path | None, lines: Mapping[KeyPath, int], flags: Mapping[KeyPath, str], given: Collection[KeyPath]
    ) -> None:
        self.file, self.lines, self.flags, self.given = file, lines, flags, given

    def of(self, path: KeyPath) -> str:
        """The setting with its place, as the beginning of a sentence."""
        for option in (path[:2], path[:1]):
            if option in self.given:
                return self.flags[option]
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        name = ".".join(map(str, path))
        return f"{self.file}, line {line}: {name}" if line else name


def _explain(error: Any, places: _Places) -> str:
    kind, context = error["type"], error.get("ctx", {})
    path: KeyPath = error["loc"]
    depth = {"method": 1, "methods": 2}.get(str(path[0]), len(path)) if path else 0
    method = path[depth] if depth < len(path) else None
    path = path[:depth] + path[depth + 1 :]  # without the name of the method, which is no key
    if kind == "extra_forbidden":
        return f"{places.of(path)} is no setting{f' of the method {method}' if method else ''}{_guess(path, method)}"
    if kind == "missing":
        return f"{places.of(path)} is missing: add {places.flags[path]}, or '{path[-1]}:' to the file of --config"
    if kind == "union_tag_invalid":
        near = get_close_matches(str(context["tag"]), METHOD_MODELS, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        names = ", ".join(METHOD_MODELS)
        return f"{places.of((*path, 'name'))} is {context['tag']!r}; it must be one of {names}{guess}"
    if kind == "union_tag_not_found":
        return f"{places.of(path)} has no name; add 'name:' with one of {', '.join(METHOD_MODELS)}"
    if kind == "value_error":  # a method's own words, which begin with the setting
        name, _, words = str(context["error"]).partition(" ")
        return f"{places.of((*path, name))} {words}"
    wanted = error["msg"].partition(", unable")[0].replace("Input should", "must")
    return f"{places.of(path)} is {_shown(error['input'])}; it {wanted}"


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path | float) else repr(value)


def _guess(path: KeyPath, method: Any) -> str:
    """What may be meant by a key that there is not."""
    name = str(path[-1])
    known = METHOD_MODELS[method].model_fields if method else FineTuneConfig.model_fields
    near = get_close_matches(name, known, 1)
    owners = [other for other, model in METHOD_MODELS.items() if name in model.model_fields and other != method]
    if owners and not method:
        return "; it belongs under 'method:'"
    if near and not owners:
        return f"; did you mean {near[0]}?"
    belongs = f"; it is one of {' and '.join(owners)}, and this method has" if owners else "; there are"
    return f"{belongs} {', '.join(key for key in known if key != 'name' or not method)}"
