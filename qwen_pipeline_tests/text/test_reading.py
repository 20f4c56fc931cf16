"""Records that cannot be used are skipped and counted within a limit; above it the text is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.text.reading import RecordReader, RecordUse
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.text.spec import TextSpec, parse_template_arguments
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline_tests.tiny import tiny_tokenizer

GOOD: dict[str, Any] = {"text": "good"}
BAD: dict[str, Any] = {"messages": [{"role": "user"}]}


def reader(root: Path, records: list[dict[str, Any]], **spec: Any) -> RecordReader:
    file = root / "text.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return RecordReader(open_text(file), LoadedTokenizer(tiny_tokenizer()), TextSpec(**spec))


def test_skipped_records_are_counted_by_reason_and_the_first_are_named(tmp_path: Path) -> None:
    records = [GOOD] * 90 + [BAD] * 7 + [{"text": "\ud83d"}, {"text": ""}]
    reading = reader(tmp_path, records, max_skipped=0.1)
    tokens = list(reading.tokens(range(len(records))))
    reading.require_few_skipped(iter(()))
    assert tokens == [tiny_tokenizer()("good<|im_end|>")["input_ids"]] * 90
    assert reading.use == RecordUse(
        used=90,
        empty=1,
        skipped={"a message has no content": 7, "has half of a surrogate pair": 1},
        first=tuple(
            f"text.jsonl line {number}: a message has no content: {BAD['messages'][0]}" for number in range(91, 96)
        ),
    )
    assert RecordUse.from_json(json.loads(json.dumps(reading.use.to_json()))) == reading.use
    assert str(reading.use).startswith("8 of 98 records were skipped: 7 (a message has no content), 1 (has half")
    assert str(reading.use).endswith("Empty records that were passed over: 1.")


def test_above_the_limit_the_text_is_refused_with_the_remedy_of_the_most_frequent_reason(tmp_path: Path) -> None:
    records = [GOOD] * 9 + [{"question": "?"}] * 2 + [BAD]
    reading = reader(tmp_path, records)
    tokens = reading.tokens(range(len(records)))
    assert sum(1 for _ in tokens) == 9
    with pytest.raises(InputRefused, match=r"max_skipped = 0\.05: 3 of 12 .* 2 \(has no known form\)") as refused:
        reading.require_few_skipped(tokens)
    assert "docs/text.md" in refused.value.remedy
    assert refused.value.remedy.endswith("Or raise max_skipped.")


def test_a_few_records_do_not_decide(tmp_path: Path) -> None:
    """One of two is bad, but one of forty is within the limit: the rest is looked at."""
    reading = reader(tmp_path, [BAD, *[GOOD] * 39])
    tokens = reading.tokens(range(40))
    next(tokens)
    assert reading.use.share == 0.5
    reading.require_few_skipped(tokens)
    assert (reading.use.used, reading.use.faults) == (19, 1)


def test_a_source_with_too_many_faults_is_not_read_to_its_end(tmp_path: Path) -> None:
    records = [BAD] * 5000
    with pytest.raises(InputRefused, match="251 of 251 records were skipped"):
        list(reader(tmp_path, records).tokens(range(len(records))))


def test_empty_records_do_not_count(tmp_path: Path) -> None:
    reading = reader(tmp_path, [{"text": ""}, GOOD, {"text": None}], max_skipped=0)
    assert len(list(reading.tokens(range(3)))) == 1
    reading.require_few_skipped(iter(()))
    assert reading.use.report().outcome == "passed"


def test_a_limit_of_one_takes_what_can_be_used(tmp_path: Path) -> None:
    reading = reader(tmp_path, [BAD, BAD, GOOD], max_skipped=1)
    assert len(list(reading.tokens(range(3)))) == 1
    reading.require_few_skipped(iter(()))
    assert reading.use.report().outcome == "warning"


@pytest.mark.parametrize(
    "spec",
    [
        {"max_skipped": -0.1},
        {"max_skipped": 1.1},
        {"max_skipped": float("nan")},
        {"template_arguments": {"tokenize": True}},
        {"template_arguments": {"now": object()}},
        {"template_arguments": {"share": float("nan")}},
        {"template_arguments": {"name": "\ud83d"}},
    ],
)
def test_settings_are_validated(spec: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match=r"max_skipped is|template_arguments cannot be used"):
        TextSpec(**spec)


def test_arguments_of_the_command_line() -> None:
    given = ["enable_thinking=false", "effort=low", 'tags=["a"]', "empty=", "equals=a=b"]
    assert parse_template_arguments(given) == {
        "enable_thinking": False, "effort": "low", "tags": ["a"], "empty": "", "equals": "a=b",
    }  # fmt: skip
    for wrong in ("enable_thinking", "=false"):
        with pytest.raises(InputRefused, match="is not NAME=VALUE"):
            parse_template_arguments([wrong])


@pytest.mark.parametrize("value", [None, [], {"used": "x"}, {"used": 1, "skipped": 3}, {}])
def test_damaged_counts_are_refused(value: object) -> None:
    with pytest.raises(CheckpointRefused, match="damaged"):
        RecordUse.from_json(value)
