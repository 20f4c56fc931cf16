"""Loading of settings, with an error message for an unknown or invalid one."""

import os
from collections.abc import Mapping
from tomllib import TOMLDecodeError
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from qwen_pipeline.config.file import FILE_VARIABLE, INTERNAL, PREFIX, config_file
from qwen_pipeline.config.sections import suggestion
from qwen_pipeline.config.settings import Settings
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
        return Settings()
    except TOMLDecodeError as error:
        raise InputRefused(f"{file} is not valid TOML: {error}.", remedy="Correct the file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputRefused(
            _explain(first), remedy=f"Correct the setting in {file} or in {_variable(first)}."
        ) from error
    except SettingsError as error:
        raise InputRefused(f"{error}: {error.__cause__}.", remedy="Write lists as JSON in the environment.") from error


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


def _variable(error: ErrorDetails) -> str:
    return PREFIX + "__".join(part.upper() for part in _path(error))


def _path(error: ErrorDetails) -> list[str]:
    """Return the keys from the top level to the invalid value; Pydantic marks an invalid key with ``[key]``."""
    return [str(part) for part in error["loc"] if part != "[key]"]


def _explain(error: ErrorDetails) -> str:
    key = ".".join(_path(error))
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
