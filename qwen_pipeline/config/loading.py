"""Settings from the file and the environment, and what is said of those that do not fit."""

import os
from collections.abc import Mapping
from tomllib import TOMLDecodeError
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from qwen_pipeline.config.file import FILE_VARIABLE, INTERNAL, PREFIX, config_file
from qwen_pipeline.config.sections import meant
from qwen_pipeline.config.settings import Settings
from qwen_pipeline.errors import InputRefused


def load_settings() -> Settings:
    """Read the file and the environment.

    Raises:
        InputRefused: The named file is missing or not TOML, a key is unknown, or a value does not fit.
    """
    file = config_file()
    if FILE_VARIABLE in os.environ and not file.is_file():
        raise InputRefused(f"{FILE_VARIABLE} names {file}, which is not there.", remedy="Correct or unset it.")
    if unknown := sorted(name for name in os.environ if _is_unknown_variable(name)):
        raise InputRefused(
            f"The environment sets {unknown[0]}, which no setting reads.{meant(unknown[0], _variables())}",
            remedy="Correct or unset it.",
        )
    try:
        return Settings()
    except TOMLDecodeError as error:
        raise InputRefused(f"{file} is not valid TOML: {error}.", remedy="Correct the file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputRefused(_explain(first), remedy=f"Correct it in {file} or in {_variable(first)}.") from error
    except SettingsError as error:
        raise InputRefused(f"{error}: {error.__cause__}.", remedy="Write lists as JSON in the environment.") from error


T = TypeVar("T")


def require_setting(value: T | None, key: str, example: str) -> T:
    """Return a setting that some command cannot do without."""
    if value is None:
        raise InputRefused(f"The setting {key} is missing.", remedy=f"Add to {config_file()}: {key} = {example}")
    return value


def _variables() -> list[str]:
    return [PREFIX + field.upper() for field in Settings.model_fields]


def _is_unknown_variable(name: str) -> bool:
    return name.startswith(PREFIX) and name not in INTERNAL and name.split("__")[0] not in _variables()


def _variable(error: ErrorDetails) -> str:
    return PREFIX + "__".join(str(part).upper() for part in error["loc"])


def _explain(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"The setting {key} does not exist.{meant(str(error['loc'][-1]), _known_beside(error['loc']))}"
    return f"The setting {key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _known_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The fields of the section that a key was found in; a table's key leads to the type of its values."""
    section: Any = Settings
    for part in loc[:-1]:
        if field := _fields(section).get(str(part)):
            section = (get_args(field.annotation) or (field.annotation,))[-1]
    return list(_fields(section))


def _fields(section: Any) -> Mapping[str, Any]:
    return getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {})
