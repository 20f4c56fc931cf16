"""The check that the embedding has a row for every token."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.qwen.tokenizer_size import tokenizer_report
from qwen_pipeline_tests.tiny import tiny_qwen2

TOKENS = 259
"""All bytes, and three special tokens."""


@pytest.mark.parametrize(("rows", "outcome"), [(TOKENS + 1, "passed"), (TOKENS, "passed"), (TOKENS - 1, "failed")])
def test_every_token_has_a_row(rows: int, outcome: str, tmp_path: Path) -> None:
    report = tokenizer_report(open_checkpoint(tiny_qwen2(tmp_path, vocab_size=rows)))
    assert (report.outcome, report.measured, report.limit) == (outcome, TOKENS, rows)


def test_added_tokens_count(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path, vocab_size=TOKENS + 1)
    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.add_tokens(["<|extra_a|>", "<|extra_b|>"])
    tokenizer.save_pretrained(root)
    report = tokenizer_report(open_checkpoint(root))
    assert report.blocks
    assert f"Tokens up to {TOKENS + 1} exist, but the embedding has {TOKENS + 1} rows" in report.detail


def test_the_files_of_a_slow_tokenizer_are_read_and_no_tokenizer_is_skipped(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path, vocab_size=TOKENS)
    (root / "tokenizer.json").unlink()
    assert tokenizer_report(open_checkpoint(root)).skipped
    (root / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    assert tokenizer_report(open_checkpoint(root)).passed
    (root / "added_tokens.json").write_text(json.dumps({"<|extra|>": TOKENS}))
    assert not tokenizer_report(open_checkpoint(root)).passed
