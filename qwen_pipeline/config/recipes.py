"""The sections ``[bases.NAME]`` and ``[recipes.NAME]``, and the application of a recipe to the settings around it."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, cast, get_type_hints

from pydantic import AfterValidator, field_validator, model_validator

from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE
from qwen_pipeline.config.queue import Priority
from qwen_pipeline.config.sections import Section, is_section
from qwen_pipeline.quantization.spec import OF_CODES
from qwen_pipeline.transforms.codes.nf4 import Statistics

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_ALTERNATIVES: Mapping[str, str] = {"targets": "tensor_parallel", "tensor_parallel": "targets"}
"""Settings of the padding that exclude each other: a recipe that has one replaces the other."""


def _require_name(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError("a name has 1 to 40 characters of A-Z a-z 0-9 . _ -, and no two dots in a row")
    if name == DEFAULT_RECIPE:
        raise ValueError("that is the name of the settings at the top level")
    return name


Name = Annotated[str, AfterValidator(_require_name)]


class _NamedSection(Section):
    """A section of a table of sections, whose tables and lists may be JSON in an environment variable."""

    @model_validator(mode="before")
    @classmethod
    def _decode(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[str, Any]", values).items()
        return {name: _decoded(value) if isinstance(value, str) else value for name, value in given}


def _decoded(value: str) -> Any:
    try:
        return json.loads(value) if value[:1] in ("[", "{") else value
    except ValueError:
        return value


class Base(_NamedSection):
    """One of several base models. A fine-tune gets the one that it names, or whose config agrees with its own.

    Attributes:
        model: Directory or hub id of the full-precision model.
        revision: Commit, tag or branch of a model on the hub.
        names: Other names by which adapters may refer to it, or patterns of names with ``*``.
        dequantize: Whether a quantized base is read as the full precision that its codes stand for.
        nf4: Whether merging starts from the base as QLoRA rounds it: ``single`` or ``double``.
        text_only: Whether of a composite model only the language model is merged and released.
        match: Patterns of names of fine-tunes that are meant for this base, if they fit others as well.
    """

    model: str
    revision: str | None = None
    names: tuple[str, ...] = ()
    dequantize: bool = False
    nf4: Statistics | None = None
    text_only: bool = False
    match: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """The settings at the top level that mean this base."""
        return {
            "base_model": self.model,
            "base_revision": self.revision,
            "base_names": self.names,
            "base_dequantize": self.dequantize,
            "base_nf4": self.nf4,
            "text_only": self.text_only,
        }


class Recipe(_NamedSection):
    """Settings of some fine-tunes, in place of those at the top level.

    Attributes:
        match: Patterns of names of the fine-tunes that it is applied to, such as ``chat-*``.
        base: The base, by its name, whose fine-tunes alone it is applied to.
        padding: Settings of the section ``padding``; those that are left out are those of the top level.
        quantization: The same for ``quantization``.
        calibration: The same for ``calibration``, or a source.
        validation: The same for ``validation``.
        leave_behind: Replaces the setting ``leave_behind`` of the top level.
        priority: Priority of its runs, to which that of ``queue`` is added; higher ones start first.
    """

    match: tuple[str, ...] = ()
    base: str | None = None
    padding: Mapping[str, Any] = {}
    quantization: Mapping[str, Any] = {}
    calibration: Mapping[str, Any] = {}
    validation: Mapping[str, Any] = {}
    leave_behind: tuple[str, ...] | None = None
    priority: Priority = 0

    @field_validator("calibration", mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("validation")
    @classmethod
    def _require_no_setting_of_the_graph(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        if found := sorted({"other_merge", "unpadded"} & value.keys()):
            raise ValueError(f"{found[0]} decides which assets there are, for all recipes: set it in [validation]")
        return value

    @property
    def overlay(self) -> dict[str, Any]:
        """The settings that it replaces."""
        given = {name: getattr(self, name) for name in ("padding", "quantization", "calibration", "validation")}
        more = {} if self.leave_behind is None else {"leave_behind": self.leave_behind}
        return {name: dict(values) for name, values in given.items() if values} | more


def overlaid(values: Mapping[str, Any], overlay: Mapping[str, Any], model: type) -> dict[str, Any]:
    """Return the values of a section with some of them replaced; in sections below it, each by itself.

    A table that is not a section, such as ``targets``, ``modules`` or ``overrides``, is replaced as a whole. Settings
    that the overlay excludes are left out: the other kind of target, and those of codes if the method has none.

    Args:
        values: The values of a section, complete or not.
        overlay: Those to replace.
        model: The section's type.
    """
    hints = get_type_hints(model)
    kept = {name: value for name, value in values.items() if name not in _excluded_by(overlay)}
    replaced = {
        name: overlaid(values.get(name) or {}, value, hints[name])
        if isinstance(value, Mapping) and is_section(hints.get(name))
        else value
        for name, value in overlay.items()
    }
    return {**kept, **replaced}


def _excluded_by(overlay: Mapping[str, Any]) -> set[str]:
    excluded = {other for name, other in _ALTERNATIVES.items() if name in overlay and other not in overlay}
    return excluded | (set(OF_CODES) if overlay.get("method", "gptq") != "gptq" else set())
