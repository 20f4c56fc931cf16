"""The projected table is what the formula gives."""

from pathlib import Path

from benchmarks.projection import MODELS, table


def test_the_projected_table_is_what_the_formula_gives() -> None:
    page = Path(__file__).parents[1] / "docs" / "performance.md"
    assert page.read_text().endswith(table() + "\n")


def test_sizes_are_those_of_the_published_checkpoints() -> None:
    """As the index of each published checkpoint states them, to a thousandth."""
    published = {"Qwen2.5-72B": 145_412_407_296, "Qwen3-235B-A22B": 470_187_269_120}
    assert all(abs(model.nbytes / published[model.name] - 1) < 1e-3 for model in MODELS)
