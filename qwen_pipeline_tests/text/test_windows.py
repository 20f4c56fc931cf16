"""Windows of tokens do not overlap and are spread over the whole text."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline.text.windows import spread, token_windows
from qwen_pipeline_tests.tiny import tiny_tokenizer


def test_windows_are_full_spread_evenly_and_do_not_overlap(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(ord("a") + i % 26) for i in range(105)))
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer(text.read_text())["input_ids"], tokenizer.eos_token_id]

    loaded = LoadedTokenizer(tokenizer)
    assert token_windows(text, loaded, windows=3, seq_len=10) == [tokens[s : s + 10] for s in (0, 30, 60)]
    assert token_windows(text, loaded, windows=99, seq_len=10) == [tokens[s : s + 10] for s in range(0, 100, 10)]
    with pytest.raises(InputRefused, match="has 106 tokens, fewer than one window of 107"):
        token_windows(text, loaded, windows=1, seq_len=107)


def test_the_only_window_is_short_if_the_text_is() -> None:
    assert spread(range(5), windows=3, seq_len=8) == [[0, 1, 2, 3, 4]]
    assert spread(range(9), windows=3, seq_len=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_records_follow_each_other_with_end_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    text.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in ({"text": "ab\u2028c"}, talk)))
    tokenizer = tiny_tokenizer()
    (window,) = token_windows(text, LoadedTokenizer(tokenizer), windows=1, seq_len=30)
    assert str(tokenizer.decode(window)).startswith("ab\u2028c<|im_end|><|im_start|>user\nHi<|im_end|>\n")
