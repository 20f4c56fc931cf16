"""Dagster's config schema of the settings, derived from their types and docstrings.

The launchpad then shows and completes every setting, and each setting is documented in one place.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import dagster as dg
from pydantic import Field, create_model

from qwen_pipeline.config import Settings
from qwen_pipeline.config.sections import is_section

Resource = TypeVar("Resource", bound="dg.ConfigurableResource[Any]")
ConfigFields = dict[str, Any]
"""Name of a setting -> (type, field), as arguments of ``pydantic.create_model``."""

_ATTRIBUTE = re.compile(r"^    (\w+): ([^\n]*(?:\n        [^\n]*)*)", re.MULTILINE)


def config_fields(model: type, values: Mapping[str, Any]) -> ConfigFields:
    """Return name -> (type, field) of each setting in ``values``; its value becomes the default."""
    hints, descriptions = get_type_hints(model), _descriptions(model)
    fields: ConfigFields = {}
    for name, value in values.items():
        description = descriptions.get(name)
        if is_section(hints[name]):
            section = _section(hints[name], value)
            fields[name] = (section, Field(default=section(), description=description))
        else:
            fields[name] = (_config_type(hints[name]) | None, Field(default=value, description=description))
    return fields


def resource_class(base: type[Resource], config: ConfigFields) -> type[Resource]:
    """Return a subclass of a resource with further fields, under the same name and documentation."""
    return create_model(base.__name__, __base__=base, __module__=base.__module__, __doc__=base.__doc__, **config)


def config_values(settings: Settings, *, without: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of settings as config; ``tensor_parallel``, which ``targets`` excludes, is then None."""
    values = settings.model_dump(mode="json", exclude=without)
    if settings.padding.targets:
        values["padding"]["tensor_parallel"] = None
    return values


def _config_type(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Path or origin is Literal:
        return str
    if origin in (Union, UnionType):
        return _config_type(next(argument for argument in arguments if argument is not NoneType))
    if origin is tuple:
        return GenericAlias(list, (_config_type(arguments[0]),))
    if origin is Mapping:
        return dict[str, Any]
    return annotation


def _section(model: type, values: Mapping[str, Any]) -> type[dg.Config]:
    return create_model(model.__name__, __base__=dg.Config, **config_fields(model, values))


def _descriptions(model: type) -> dict[str, str]:
    """Return name -> description of each attribute in a class's docstring."""
    attributes = _ATTRIBUTE.findall(inspect.getdoc(model) or "")
    return {name: " ".join(text.replace("``", "`").split()) for name, text in attributes}
