import pytest

from qwen_pipeline.evaluation.samples import Completion, Sample, degeneration


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The capital of France is Paris.", None),
        ("A ruler: ----------------, a heading: ========, and so on........", None),
        ("no no no", None),
        ("", "is empty"),
        (" \n", "is empty"),
        ("Sure!!!!!!!!!!!!", "contains '!' 12 times in a row"),
        ("one two two two two", "ends with 'two' repeated 4 times"),
        ("well " + "this is it. " * 4, "ends with 'this is it.' repeated 4 times"),
    ],
)
def test_degeneration(text: str, fault: str | None) -> None:
    assert degeneration(text) == fault


def answer(text: str, *tokens: int, ended: bool = True) -> Completion:
    return Completion(text=text, tokens=tokens, ended=ended)


@pytest.mark.parametrize(
    ("text", "tokens", "fault"),
    [
        ("lalalalala", (9,) + (4,) * 10, "ends with the same token repeated 10 times"),
        ("well", (9,) + (7, 8) * 4, "ends with the same 2 tokens repeated 4 times"),
        ("Title\n----------", (9,) + (4,) * 10, None),
        ("no no no", (4, 4, 4), None),
    ],
)
def test_repeated_tokens_are_detected_where_words_are_not(
    text: str, tokens: tuple[int, ...], fault: str | None
) -> None:
    assert Completion(text=text, tokens=tokens, ended=False).degeneration == fault
    assert Completion(text=text, tokens=(*tokens, 2), ended=True).degeneration == fault


BROKEN, FINE = answer("!" * 20, *[7] * 5, ended=False), answer("Paris.", 3, 4)


def test_only_what_quantization_broke_counts() -> None:
    assert Sample(prompt="?", reference=FINE, candidate=BROKEN).fault
    assert not Sample(prompt="?", reference=BROKEN, candidate=BROKEN).fault
    assert not Sample(prompt="?", reference=BROKEN, candidate=FINE).fault
    assert not Sample(prompt="?", reference=FINE, candidate=None).fault


def test_an_answer_that_does_not_end_where_the_other_did_is_a_fault() -> None:
    rambling = answer("Paris, of course, and", 3, 4, 5, 6, ended=False)
    fault = "has not ended after 4 tokens, while the merged model's ended after 2"
    assert Sample(prompt="?", reference=FINE, candidate=rambling).fault == fault
    longer = answer("Paris, of course", 3, 4, 5, ended=True)
    assert not Sample(prompt="?", reference=longer, candidate=rambling).fault
    assert not Sample(prompt="?", reference=answer("Paris", 3, 4, ended=False), candidate=rambling).fault


def test_answers_agree_up_to_their_first_different_token() -> None:
    sample = Sample(prompt="?", reference=answer("A list is", 1, 2, 3), candidate=answer("A list has", 1, 2, 9, 3))
    assert (sample.agreed_tokens, sample.agreed_characters) == (2, len("A list "))
    assert Sample(prompt="?", reference=FINE, candidate=None).agreed_tokens == 0
