"""The Python API: complete for editors, imported on first use, and free to import."""

import ast
import inspect
import os
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

import qwen_pipeline as qp

API: dict[str, str] = vars(qp)["_API"]
HEAVY = ("torch", "dagster", "pydantic", "pandas", "transformers", "numpy")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, qwen_pipeline; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in HEAVY if name in modules]
    assert [name for name in modules if name.startswith("qwen_pipeline")] == ["qwen_pipeline"]


def test_importing_the_package_takes_less_than_a_tenth_of_a_second() -> None:
    """Processor time above that of bare Python, so that a busy machine does not count."""
    assert _processor_seconds("import qwen_pipeline") - _processor_seconds("pass") < 0.1


def test_no_name_of_the_api_is_a_module_of_the_package() -> None:
    """Importing a submodule sets an attribute of the package, which would shadow the name."""
    assert not [name for name in API if util.find_spec(f"qwen_pipeline.{name}")]


@pytest.mark.parametrize("name", sorted(API))
def test_every_name_can_be_imported_and_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(qp, name))
    assert name in dir(qp)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(qp.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    sources: dict[str, str] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            sources |= {each.name: f"{node.module}:{each.name}".removeprefix("qwen_pipeline.") for each in node.names}
        else:
            alias, name = ast.unparse(node).split(" = ")
            sources[alias] = sources.pop(name)
    assert sources == API
    assert list(API) == sorted(API)


def test_the_api_has_every_stage_and_every_error() -> None:
    errors = import_module("qwen_pipeline.errors")
    kinds = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    stages = {file.stem for file in (Path(qp.__file__).parent / "stages").glob("[a-z]*.py")}
    assert kinds | stages <= API.keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'qwen_pipeline' has no attribute 'mrege'"):
        getattr(qp, "mrege")  # noqa: B009


def _processor_seconds(code: str) -> float:
    """Return the least processor time, in seconds, that a new interpreter takes to run ``code``."""
    seconds: list[float] = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)
