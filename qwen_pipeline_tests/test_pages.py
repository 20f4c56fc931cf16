"""README and ``docs/`` refer to files, tests and targets that exist."""

import re
from pathlib import Path

import pytest

from qwen_pipeline_tests import REPOSITORY

TESTS = REPOSITORY / "qwen_pipeline_tests"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@all_pages
def test_a_page_begins_with_its_title(page: Path) -> None:
    assert page.read_text().startswith("# ")


@all_pages
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@all_pages
def test_modules_and_tests_that_pages_name_exist(page: Path) -> None:
    """By their path in the repository, the package or the tests; a test also by its file name alone."""
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)(?::\w+)?`", page.read_text()))
    folders = (REPOSITORY, REPOSITORY / "qwen_pipeline", TESTS)
    assert not {name for name in names if not any((root / name).exists() for root in folders) and not _by_name(name)}


@all_pages
def test_make_targets_that_pages_name_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)`", page.read_text())) <= set(targets)


@all_pages
def test_lines_are_wrapped(page: Path) -> None:
    generated = r"^<!-- (\w+): begin -->$.*?^<!-- \1: end -->$"
    prose = re.sub(rf"^```.*?^```$|{generated}", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "<!--"))]


def _by_name(name: str) -> bool:
    return "/" not in name and any([*TESTS.rglob(name), *(REPOSITORY / "qwen_pipeline").rglob(name)])
