"""The examples of ``docs/python.md`` and of the README, run in their order on a tiny model; none is left out."""

import re
from pathlib import Path

import pytest

from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

README, PAGE = REPOSITORY / "README.md", REPOSITORY / "docs" / "python.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.engine
def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "my-model"
    tiny_adapter(tiny_qwen2(root / "base"), root / "adapter")
    write_text(root / "calibration.jsonl", documents=24, stride=7)
    write_text(root / "held-out.jsonl", documents=12, stride=5)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, example in enumerate(examples(), start=1):
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), namespace)


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_adapter(tiny_qwen2(tmp_path / "base"), tmp_path / "my-lora")
    monkeypatch.chdir(tmp_path)
    (example,) = examples(README)
    exec(compile(example, README.name, "exec"), {})


def test_every_block_of_the_page_is_an_example_or_plain_text() -> None:
    assert {language for language, _ in FENCE.findall(PAGE.read_text())} == {"", "python"}
    assert PAGE.read_text().count("```") == 2 * len(FENCE.findall(PAGE.read_text()))


def test_the_page_shows_every_stage() -> None:
    stages = {file.stem for file in (REPOSITORY / "qwen_pipeline" / "stages").glob("[a-z]*.py")}
    assert not {stage for stage in stages if f"qp.{stage}(" not in "".join(examples())}


def examples(page: Path = PAGE) -> list[str]:
    """Return the Python blocks of a page in their order."""
    return [text for language, text in FENCE.findall(page.read_text()) if language == "python"]
