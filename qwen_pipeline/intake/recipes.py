"""The recipes of a fine-tune: those that the settings apply to its name and base, or that its upload asks for."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE, Product
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.errors import InputRefused

CHOICE = "recipe.toml"
"""The file with which an upload asks for recipes by their names: ``recipes = ["fast"]``."""
_CHOICE_BYTES = 2**16


def products_of(settings: Settings, name: str, *, base: str, root: Path) -> list[Product]:
    """Return the products of a fine-tune: one for each recipe of its rule.

    The recipes are those that the file :data:`CHOICE` names, if the settings allow it; or else those with a pattern
    that matches the name; or else the setting ``default_recipes``; or else the settings at the top level.

    Raises:
        InputRefused: The file asks for recipes that do not exist, or that are not for its base.
    """
    chosen = chosen_recipes(root) if settings.uploads_choose_recipes else []
    for each in chosen:
        require_recipe(settings, each, base)
    matching = [
        recipe
        for recipe, rule in settings.recipes.items()
        if rule.base in (None, base) and any(fnmatchcase(name, pattern) for pattern in rule.match)
    ]
    recipes = chosen or matching or settings.default_recipes or [DEFAULT_RECIPE]
    return [Product(name, None if recipe == DEFAULT_RECIPE else recipe) for recipe in dict.fromkeys(recipes)]


def require_recipe(settings: Settings, recipe: str, base: str) -> None:
    """Require that there is a recipe, and that it is for the fine-tunes of a base.

    Raises:
        InputRefused: It is not.
    """
    if recipe == DEFAULT_RECIPE:
        return
    settings_of(settings, recipe)
    if (only := settings.recipes[recipe].base) not in (None, base):
        raise InputRefused(
            f"The recipe {recipe!r} is for fine-tunes of the base {only!r}, not of {base!r}.",
            remedy=f"Choose another recipe: {', '.join([DEFAULT_RECIPE, *settings.recipes])}.",
        )


def chosen_recipes(root: Path) -> list[str]:
    """Return the recipes that an upload asks for; none if it has no file :data:`CHOICE`.

    Raises:
        InputRefused: The file has anything but a list of names.
    """
    file = root / CHOICE
    if not file.is_file():
        return []
    try:
        with file.open("rb") as opened:
            found: Any = tomllib.loads(opened.read(_CHOICE_BYTES).decode())
    except ValueError as error:
        raise _no_choice(file, str(error)) from error
    recipes = found.get("recipes")
    if found.keys() != {"recipes"} or not isinstance(recipes, list) or not recipes:
        raise _no_choice(file, f"it has {', '.join(found) or 'nothing'}")
    if not all(isinstance(each, str) for each in recipes):
        raise _no_choice(file, f"recipes is {recipes!r}")
    return recipes


def _no_choice(file: Path, reason: str) -> InputRefused:
    return InputRefused(
        f"{file.name} names no recipes: {reason}.",
        remedy=f'Write only their names into {file}: recipes = ["fast"]. Settings belong to the operator.',
    )
