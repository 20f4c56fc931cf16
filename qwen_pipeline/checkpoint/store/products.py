"""The products of a fine-tune: one for each recipe that is applied to it.

A product is named by its key, ``<fine-tune>`` for the default recipe and ``<fine-tune>@<recipe>`` for another one. The
key is the partition in Dagster, the name in the store, and the name on the command line. A fine-tune's name has no
``@``, so that a key is unambiguous.
"""

from dataclasses import dataclass

DEFAULT_RECIPE = "default"
"""The name of the settings at the top level, where a name is needed; no recipe may have it."""
_AT = "@"


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """One recipe applied to one fine-tune.

    Attributes:
        recipe: The recipe's name; None for the default one.
    """

    fine_tune: str
    recipe: str | None = None

    @property
    def key(self) -> str:
        return f"{self.fine_tune}{self.suffix}"

    @property
    def suffix(self) -> str:
        """``@<recipe>``; empty for the default recipe."""
        return f"{_AT}{self.recipe}" if self.recipe else ""

    @property
    def arguments(self) -> str:
        """The arguments of a command that mean it."""
        return f"{self.fine_tune} --recipe {self.recipe}" if self.recipe else self.fine_tune

    @property
    def mark(self) -> str:
        """``@<recipe>``, also for the default recipe."""
        return f"{_AT}{self.recipe or DEFAULT_RECIPE}"


def product(key: str) -> Product:
    """Return the product of a key; of a fine-tune's name, that of the default recipe."""
    fine_tune, _, recipe = key.partition(_AT)
    return Product(fine_tune, None if recipe in ("", DEFAULT_RECIPE) else recipe)
