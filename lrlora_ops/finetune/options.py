"""The schema's settings as options of a command: no option is written down twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from lrlora_ops.finetune.config import METHOD_MODELS, METHODS, FineTuneConfig, option_paths


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put an option for every setting in the place of the command's ``**options``; one that is not given is None."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *(_option(name, path) for name, path in option_paths().items())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option(name: str, path: tuple[str, ...]) -> inspect.Parameter:
    if path == ("method", "name"):
        kind: Any = Literal[tuple(METHODS)]
        text = FineTuneConfig.model_fields["method"].description
        text = f"{text} [default: {FineTuneConfig.model_fields['method'].default.name}]"
    elif path[0] == "method":
        fields = {m: model.model_fields[path[1]] for m, model in METHOD_MODELS.items() if path[1] in model.model_fields}
        kind = next(iter(fields.values())).annotation
        text = " ".join(f"{method}: {_said_of(field)}" for method, field in fields.items())
    else:
        field = FineTuneConfig.model_fields[name]
        kind, text = field.annotation, _said_of(field)
    flag, metavar = "--" + name.replace("_", "-"), "FILE..." if name == "train" else None
    option = typer.Option(flag, help=text, metavar=metavar)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option])


def _said_of(field: FieldInfo) -> str:
    default = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
    return f"{field.description}{default}"
