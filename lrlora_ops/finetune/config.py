"""The settings of ``lrlora finetune``: one schema for its file, its options, their help and ``lrlora schema``.

The settings of the rank methods are those of their dataclasses, read from there with types, defaults and docstrings.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from lrlora_ops import DynamicRank, FixedRank, LearnedRank, SincUpdate
from lrlora_ops.methods import Method

METHODS: dict[str, Any] = {"fixed": FixedRank, "learned": LearnedRank, "dynamic": DynamicRank, "sinc": SincUpdate}
OF_THE_RUN = ("total_steps", "seed")  # settings of methods that are the run's own: steps and seed


class Strict(BaseModel):
    """Keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSettings(Strict):
    """What the settings of all methods have in common."""

    name: str

    @model_validator(mode="after")
    def _accepted_by_the_method(self) -> MethodSettings:
        self.method(total_steps=1, seed=0)
        return self

    def method(self, **of_the_run: Any) -> Method:
        """The method with these settings; with ``learned``, ``max_rank`` is four times the mean unless it is given."""
        made = METHODS[self.name]
        values: dict[str, Any] = self.model_dump(exclude={"name"}, exclude_unset=True)
        if made is LearnedRank and values.get("max_rank") is None:
            mean_rank = values.get("mean_rank", LearnedRank.mean_rank)
            values["max_rank"] = math.ceil(4 * mean_rank) if 0 < mean_rank < math.inf else LearnedRank.max_rank
        own = {field.name for field in dataclasses.fields(made)}
        method = made(**values, **{key: value for key, value in of_the_run.items() if key in own})
        if made is LearnedRank and method.mean_rank > method.max_rank:
            raise ValueError(f"max_rank is {method.max_rank}; it must be at least mean_rank, {method.mean_rank:g}")
        return method


def argument_docs(documented: type) -> dict[str, str]:
    """What a docstring says of each argument under ``Args:``."""
    arguments = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.finditer(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.MULTILINE)
    return {match[1]: " ".join(match[2].replace("``", "").split()) for match in found}


def _settings_model(name: str, method: Any) -> type[MethodSettings]:
    types, docs = get_type_hints(method), argument_docs(method)
    fields: dict[str, Any] = {
        field.name: (types[field.name], Field(field.default, description=docs[field.name]))
        for field in dataclasses.fields(method)
        if field.name not in OF_THE_RUN
    }
    if method is LearnedRank:
        fields["max_rank"] = (int | None, Field(None, description=f"{docs['max_rank']} Default: four times mean_rank."))
    fields["name"] = (Literal[name], Field(name, description=f"{method.__name__}."))
    return create_model(f"{method.__name__}Settings", __base__=MethodSettings, **fields)


METHOD_MODELS = {name: _settings_model(name, method) for name, method in METHODS.items()}

if TYPE_CHECKING:
    AnyMethod = MethodSettings
else:
    AnyMethod = Annotated[Union[tuple(METHOD_MODELS.values())], Field(discriminator="name")]  # noqa: UP007


class FineTuneConfig(Strict):
    """Settings of ``lrlora finetune``."""

    model: Path = Field(description="Hugging Face model directory; nothing is downloaded.")
    train: list[Path] = Field(
        min_length=1,
        description="UTF-8 files to train on: text, or .jsonl with {text}, {prompt, completion} or {messages} on each "
        "line. Of prompt and completion only the completion counts for the loss, as in TRL; of messages, through the "
        "tokenizer's chat template, only what the assistant says (TRL's assistant_only_loss=True).",
    )
    method: AnyMethod = Field(METHOD_MODELS["learned"](name="learned"), description="How ranks are chosen.")
    methods: dict[str, AnyMethod] | None = Field(
        None,
        min_length=1,
        description="In place of method and targets: names or globs of layers, each with its method; the first match.",
    )
    targets: list[str] | None = Field(
        None, min_length=1, description="Layers, as names or globs. Default: experts with dynamic, else all-linear."
    )
    lora_alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Scale of the updates times the highest rank. Default: twice that."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Of the inputs of adapters of linear layers; experts have none."
    )
    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(8, ge=1, description="Rows in a batch.")
    seq_len: int = Field(256, ge=2, description="Tokens in a row; of longer examples the rest is cut off.")
    lr: float = Field(5e-4, gt=0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of each text file, or of all examples, that is held out: the end."
    )
    save_steps: int = Field(100, ge=1, description="Steps between two checkpoints, of which the newest is kept.")
    output: Path = Field(Path("lrlora-adapter"), description="New directory for checkpoints and the adapter.")
    seed: int = Field(0, description="Of the adapters, the batches and the sampled ranks.")
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the model; auto is the checkpoint's own."
    )

    @model_validator(mode="after")
    def _method_or_methods(self) -> FineTuneConfig:
        if self.methods and self.model_fields_set & {"method", "targets"}:
            raise ValueError("methods is given beside method or targets; leave out the one or the other")
        return self

    @property
    def layers(self) -> list[str]:
        """The keys of ``methods``, or ``targets``, or what ``method`` is for."""
        default = "experts" if self.method.name == "dynamic" else "all-linear"
        return list(self.methods or self.targets or [default])

    @property
    def method_names(self) -> str:
        """Of the methods' classes, for titles."""
        chosen = self.methods.values() if self.methods else [self.method]
        return ", ".join(dict.fromkeys(METHODS[own.name].__name__ for own in chosen))

    def method_for(self, steps: int) -> Method | dict[str, Method]:
        """What ``apply_lora`` takes, for a run of so many steps: one method over all targets, or one by pattern."""
        run = {"total_steps": steps, "seed": self.seed}
        if self.methods:
            return {pattern: own.method(**run) for pattern, own in self.methods.items()}
        return self.method.method(**run)

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, to be read again."""
        return self.model_dump(mode="json", exclude={"method", "targets"} if self.methods else {"methods"})


def option_paths() -> dict[str, tuple[str, ...]]:
    """Where in the schema each option's value goes: top-level keys, then the methods' settings; ``methods`` has none.

    A setting of a method that is called as a key of the run is, becomes ``method_lr`` and the like.
    """
    paths: dict[str, tuple[str, ...]] = {name: (name,) for name in FineTuneConfig.model_fields if name != "methods"}
    paths["method"] = ("method", "name")
    for model in METHOD_MODELS.values():
        for name in model.model_fields:
            if name != "name":
                option = f"method_{name}" if name in FineTuneConfig.model_fields else name
                paths[option] = ("method", name)
    return paths
