"""Patterns that name modules: regular expressions of RE2, which matches in linear time."""

from functools import cache
from importlib import import_module
from typing import Any


@cache
def compile_pattern(pattern: str, *, around: str = "{}") -> Any:
    """Compile a pattern with RE2; matching one of an uploader with Python's ``re`` may never end.

    Args:
        pattern: The regular expression.
        around: The expression to compile, with ``{}`` in the pattern's place.

    Raises:
        ValueError: The pattern is not a regular expression, or uses lookaround or backreferences.
    """
    re2: Any = import_module("re2")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(around.replace("{}", pattern, 1), options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else error
        raise ValueError(
            f"{pattern!r} is not a regular expression of RE2 ({reason}), which has neither lookaround nor"
            " backreferences; names of modules need none"
        ) from error
