"""The house rules that no linter knows: sizes of functions, files and folders, and the first words of docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_pipeline_tests import REPOSITORY

PACKAGE = REPOSITORY / "qwen_pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))
FUNCTION_LINES, PARAMETERS, MODULES_IN_A_FOLDER = 60, 10, 18
QUESTION_WORDS = re.compile(r"(What|Whether|How|Where|Who|When|Which|Why|Return what)\b")
PEOPLE = re.compile(r"\b(whoever|nobody|somebody|everybody)\b", re.IGNORECASE)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether Typer reads the parameters as options of the command line."""
    called = (d.func for d in function.decorator_list if isinstance(d, ast.Call))
    return any(isinstance(name, ast.Name) and name.id == "command" for name in called)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    named = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", "module"), ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for function in functions(path):
        if not is_command(function):
            assert (function.end_lineno or 0) - function.lineno < FUNCTION_LINES, function.name
            assert len(parameters(function)) <= PARAMETERS, function.name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_state_and_do_not_ask(path: Path) -> None:
    for name, text in docstrings(path):
        assert not QUESTION_WORDS.match(text), f"{name}: {text.splitlines()[0]}"
        assert not PEOPLE.search(text), f"{name}: {text}"


def test_every_folder_is_a_package_that_says_what_it_holds_and_has_few_modules() -> None:
    for folder in sorted({path.parent for path in MODULES}):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
        assert len(list(folder.glob("*.py"))) - 1 <= MODULES_IN_A_FOLDER, folder
