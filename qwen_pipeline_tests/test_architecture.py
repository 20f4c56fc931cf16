"""``docs/architecture.md`` and the import contracts of ``pyproject.toml`` describe the same rooms."""

import re
import tomllib
from pathlib import Path
from typing import Any

import qwen_pipeline
from qwen_pipeline_tests import REPOSITORY

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
ROW = re.compile(r"^\| ((?:`\w+` ?)+)\|", re.MULTILINE)


def test_the_page_has_the_rooms_of_the_contract_in_its_order() -> None:
    rows = [tuple(re.findall(r"`(\w+)`", row)) for row in ROW.findall(PAGE)]
    assert rows == [tuple(layer.split(" | ")) for layer in contract("layers")["layers"]]


def test_the_contract_names_every_module_of_the_package() -> None:
    root = Path(qwen_pipeline.__file__).parent
    modules = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/__init__.py")}
    assert modules - {"__init__"} == rooms()
    assert contract("layers")["exhaustive"]


def test_rooms_that_may_import_dagster_are_those_of_the_page() -> None:
    free = rooms() - {name.removeprefix("qwen_pipeline.") for name in contract("forbidden")["source_modules"]}
    (sentence,) = re.findall(r"`dagster` is imported by (.*?)\s+alone", PAGE, re.DOTALL)
    assert free == {*re.findall(r"`(\w+)`", sentence), "__main__"}


def contract(kind: str) -> dict[str, Any]:
    """Return the contract of a type of import-linter's."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (found,) = (each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == kind)
    return found


def rooms() -> set[str]:
    return {room for layer in contract("layers")["layers"] for room in layer.split(" | ")}
