import pytest

from qwen_pipeline.evaluation.samples import Sample, degeneration


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The capital of France is Paris.", None),
        ("A ruler: ----------------, a heading: ========, and so on........", None),
        ("no no no", None),
        ("", "is empty"),
        (" \n", "is empty"),
        ("Sure!!!!!!!!!!!!", "has a run of 12 times '!'"),
        ("one two two two two", "ends in 'two' said 4 times"),
        ("well " + "this is it. " * 4, "ends in 'this is it.' said 4 times"),
    ],
)
def test_degeneration(text: str, fault: str | None) -> None:
    assert degeneration(text) == fault


def test_only_what_quantization_broke_counts() -> None:
    broken, fine = "!" * 20, "Paris."
    assert Sample(prompt="?", reference=fine, candidate=broken).fault
    assert not Sample(prompt="?", reference=broken, candidate=broken).fault
    assert not Sample(prompt="?", reference=broken, candidate=fine).fault
    assert not Sample(prompt="?", reference=fine, candidate=None).fault
