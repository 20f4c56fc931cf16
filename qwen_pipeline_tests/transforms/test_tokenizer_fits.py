"""A tokenizer with tokens that have no row in the embedding fails a check; ids are those of ``AutoTokenizer``."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.reports import CheckReport
from qwen_pipeline.transforms.tokenizer_fits import token_ids, tokenizer_report
from qwen_pipeline_tests.tiny import tiny_qwen3, tiny_tokenizer


def report(root: Path) -> CheckReport:
    return tokenizer_report(open_checkpoint(root))


@pytest.mark.parametrize(("rows", "outcome"), [(261, "passed"), (320, "passed"), (260, "failed"), (259, "failed")])
def test_every_token_needs_a_row(rows: int, outcome: str, tmp_path: Path) -> None:
    tiny_qwen3(tmp_path, vocab_size=rows)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra a|>", "<|extra b|>"])
    tokenizer.save_pretrained(tmp_path)
    found = report(tmp_path)
    assert (found.outcome, found.measured, found.limit) == (outcome, 261.0, float(rows))
    assert token_ids(open_checkpoint(tmp_path).sidecars) == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    if outcome == "failed":
        assert "260 '<|extra b|>'" in found.detail
        assert f"none for {261 - rows} tokens" in found.detail


def test_tokens_of_all_files_count(tmp_path: Path) -> None:
    tiny_qwen3(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert report(tmp_path).outcome == "skipped"
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 5}))
    assert report(tmp_path).measured == 6.0
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|x|>": 700}))
    assert report(tmp_path).outcome == "failed"


UNREADABLE = (
    "{", "[]", '{"model": 5}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": {"a": 1e999}}}',
    '{"model": {"vocab": [1]}}', '{"added_tokens": [{}]}',
)  # fmt: skip


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_tokenizer_that_cannot_be_read_is_not_measured(content: str, tmp_path: Path) -> None:
    tiny_qwen3(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointRefused):
        token_ids(open_checkpoint(tmp_path).sidecars)
    assert report(tmp_path).outcome == "skipped"
