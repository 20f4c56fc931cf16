"""The table in docs/geometry.md is what the rules say today."""

from qwen_pipeline_tests.qwen.geometry_document import DOCUMENT, written


def test_the_document_does_not_rot() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "run: python -m qwen_pipeline_tests.qwen.geometry_document"
