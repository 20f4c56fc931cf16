"""Loading of settings, with an error message for an unknown or invalid one."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE
from qwen_pipeline.config.file import FILE_VARIABLE, INTERNAL, PREFIX, config_file
from qwen_pipeline.config.recipes import overlaid
from qwen_pipeline.config.sections import suggestion
from qwen_pipeline.config.settings import OF_BASE, Settings
from qwen_pipeline.errors import InputRefused


def load_settings() -> Settings:
    """Read the settings file and the environment.

    Raises:
        InputRefused: The file is missing or is not valid TOML, a key is unknown, or a value is invalid.
    """
    file = config_file()
    if FILE_VARIABLE in os.environ and not file.is_file():
        raise InputRefused(
            f"{FILE_VARIABLE} names {file}, which does not exist.", remedy="Correct or unset the variable."
        )
    if unknown := sorted(name for name in os.environ if _is_unknown_variable(name)):
        raise InputRefused(
            f"The environment variable {unknown[0]} is not a setting.{suggestion(unknown[0], _variables())}",
            remedy="Correct or unset the variable.",
        )
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        raise InputRefused(_explain(first), remedy=_remedy(first)) from error
    except SettingsError as error:
        raise InputRefused(f"{error}: {error.__cause__}.", remedy="Write lists as JSON in the environment.") from error
    _require_consistent_names(settings)
    for recipe in settings.recipes:
        settings_of(settings, recipe)
    return settings


def _require_consistent_names(settings: Settings) -> None:
    """Require that bases are declared in one place, and that recipes and bases that are named exist."""
    bases, recipes = list(settings.bases), [DEFAULT_RECIPE, *settings.recipes]
    beside = [name for name in OF_BASE if bases and getattr(settings, name)]
    of_recipes = [(f"recipes.{name}.base", recipe.base, bases) for name, recipe in settings.recipes.items()]
    defaults = [("default_recipes", name, recipes) for name in settings.default_recipes]
    unknown = [each for each in (*of_recipes, *defaults) if each[1] is not None and each[1] not in each[2]]
    if beside:
        raise InputRefused(
            f"The setting {beside[0]} is {getattr(settings, beside[0])!r}, but there are sections [bases.NAME] too.",
            remedy=f"In {config_file()}, move it into the section of its base.",
        )
    for key, name, known in unknown[:1]:
        raise InputRefused(
            f"The setting {key} is {name!r}, which does not exist.{suggestion(str(name), known)}",
            remedy=f"Correct the setting in {config_file()}.",
        )


class _GivenSettings(Settings):
    """Settings from given values only, without the file and the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def settings_from_values(values: Mapping[str, Any]) -> Settings:
    """Validate settings given as values; neither the file nor the environment is read.

    Raises:
        InputRefused: A key is unknown, or a value is invalid.
    """
    try:
        return _GivenSettings(**values)
    except ValidationError as error:
        raise InputRefused(_explain(error.errors()[0]), remedy="Correct the setting.") from error


def settings_of(
    settings: Settings, recipe: str | None, *, base: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings of one product: one recipe applied to the fine-tunes of one base.

    Args:
        settings: All settings.
        recipe: The recipe's name; None for the default one.
        base: The base's name among several.
        overrides: Values that go before those of the recipe, such as those of one run.

    Raises:
        InputRefused: There is no such recipe, or its values are invalid; the message has the full name of the setting.
    """
    if recipe is not None and recipe not in settings.recipes:
        raise InputRefused(
            f"There is no recipe {recipe!r}.{suggestion(recipe, [DEFAULT_RECIPE, *settings.recipes])}",
            remedy=f"Use the name of a section [recipes.NAME] in {config_file()}.",
        )
    if recipe is None and base is None:
        return settings
    values = {name: value for name, value in settings.values.items() if name not in _OF_SEVERAL}
    if base is not None:
        values |= settings.bases[base].values
    if not values.get("base_nf4"):  # there is nothing to compare with
        values["validation"]["other_merge"] = False
    overlay = settings.recipes[recipe].overlay if recipe else {}
    above = f"recipes.{recipe}" if recipe else ""
    for given in (overlay, overrides or {}):
        values = overlaid(values, given, Settings)
    try:
        for name in overlay:
            _require_valid(name, values[name], above)
        return _GivenSettings(**values)
    except ValidationError as error:
        raise InputRefused(_explain(error.errors()[0], above), remedy=_remedy(error.errors()[0], above)) from error


_OF_SEVERAL = ("bases", "recipes", "default_recipes", "uploads_choose_recipes")
"""Settings that one product does not have."""


def _require_valid(name: str, value: Any, above: str) -> None:
    """Validate one section, so that the refusal of a section that knows only its own names is about ``above.name``."""
    try:
        Settings.__pydantic_validator__.validate_assignment(Settings.model_construct(), name, value)
    except ValidationError:
        raise
    except InputRefused as refused:
        setting, _, rest = refused.what.partition(" ")
        is_named = setting in _fields(Settings.model_fields[name].annotation)
        what = f"{above}.{name}.{setting} {rest}" if is_named else f"{above}.{name}: {refused.what}"
        raise InputRefused(f"The setting {what}" if is_named else what, remedy=refused.remedy) from refused


T = TypeVar("T")


def require_setting(value: T | None, key: str, example: str) -> T:
    """Return the value of a required setting.

    Raises:
        InputRefused: The setting is missing.
    """
    if value is None:
        raise InputRefused(f"The setting {key} is missing.", remedy=f"Add to {config_file()}: {key} = {example}")
    return value


def _variables() -> list[str]:
    return [PREFIX + field.upper() for field in Settings.model_fields]


def _is_unknown_variable(name: str) -> bool:
    return name.startswith(PREFIX) and name not in INTERNAL and name.split("__")[0] not in _variables()


def _remedy(error: ErrorDetails, above: str = "") -> str:
    variable = PREFIX + "__".join(part.upper() for part in _path(error, above))
    return f"Correct the setting in {config_file()} or in {variable}."


def _path(error: ErrorDetails, above: str = "") -> list[str]:
    """Return the keys from the top level to the invalid value; Pydantic marks an invalid key with ``[key]``."""
    return [*above.split(".")] * bool(above) + [str(part) for part in error["loc"] if part != "[key]"]


def _explain(error: ErrorDetails, above: str = "") -> str:
    key = ".".join(_path(error, above))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"The setting {key} does not exist.{suggestion(str(error['loc'][-1]), _known_beside(error['loc']))}"
    return f"The setting {key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:].rstrip('.')}."


def _known_beside(loc: tuple[int | str, ...]) -> list[str]:
    """Return the fields of the section that a key belongs to; within a table, those of the type of its values."""
    section: Any = Settings
    for part in loc[:-1]:
        if field := _fields(section).get(str(part)):
            section = (get_args(field.annotation) or (field.annotation,))[-1]
    return list(_fields(section))


def _fields(section: Any) -> Mapping[str, Any]:
    return getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {})
