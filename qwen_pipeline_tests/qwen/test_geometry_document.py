"""The tables in docs/geometry.md are up to date."""

import pytest

from qwen_pipeline_tests.qwen.geometry_document import DOCUMENT, with_tables


@pytest.mark.slow
def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert text == with_tables(text), "run: python -m qwen_pipeline_tests.qwen.geometry_document"
