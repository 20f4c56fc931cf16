"""Checks of single settings: one of a few values, a lower bound, a share."""

from qwen_pipeline.errors import InputRefused


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Require one of a few values.

    Raises:
        InputRefused: It is none of them.
    """
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise InputRefused(f"{name} is {value!r}, expected one of {choices}.", remedy=f"Set {name} to one of them.")


def require_share(name: str, value: float) -> None:
    """Require a value above 0 and below 1.

    Raises:
        InputRefused: It is outside.
    """
    if not 0 < value < 1:
        raise InputRefused(f"{name} is {value}, expected a value above 0 and below 1.", remedy=f"Set {name} to 0.05.")


def require_at_least(name: str, value: float, *, low: float) -> None:
    """Require a value of at least ``low``.

    Raises:
        InputRefused: It is lower.
    """
    if value < low:
        raise InputRefused(
            f"{name} is {value}, expected at least {low}.", remedy=f"Set {name} to {low} or a larger value."
        )
