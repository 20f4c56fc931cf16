"""Windows of calibration tokens depend on the file, the tokenizer and the seed, and on nothing else."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.corpus import load_records
from qwen_pipeline.engines.calibration import draw_windows, shuffled, window_digest
from qwen_pipeline.errors import InputRefused
from qwen_pipeline_tests.tiny import tiny_tokenizer

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(root)
    return root


def write(root: Path, *records: Any) -> Path:
    file = root / "calibration.jsonl"
    file.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return file


def draw(file: Path, checkpoint: Path, *, samples: int = 2, seq_len: int = 8, seed: int = 0) -> torch.Tensor:
    return draw_windows(file, checkpoint, samples=samples, seq_len=seq_len, seed=seed)


def test_records_are_packed_back_to_back_with_an_end_after_text(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = write(tmp_path, {"text": "abcdef"}, {"text": "ghijkl"})
    windows = draw(file, checkpoint, samples=2, seq_len=7)
    assert windows.dtype == torch.int32
    texts = [tokenizer.decode(row) for row in windows]
    assert sorted(texts) == ["abcdef<|im_end|>", "ghijkl<|im_end|>"]


def test_a_conversation_is_written_by_the_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(TALK["messages"], tokenize=True, return_dict=False)
    windows = draw(write(tmp_path, TALK), checkpoint, samples=1, seq_len=len(expected))
    assert windows[0].tolist() == expected


def test_the_draw_ignores_and_leaves_alone_the_global_random_state(checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, *({"text": f"record number {i}"} for i in range(9)))
    torch.manual_seed(1)
    random.seed(1)
    first = draw(file, checkpoint, samples=9, seq_len=16)
    after = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    assert (torch.rand(1), random.random()) == after
    assert torch.equal(draw(file, checkpoint, samples=9, seq_len=16), first)
    assert not torch.equal(draw(file, checkpoint, samples=9, seq_len=16, seed=1), first)


@given(count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_shuffling_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(shuffled(count, seed)) == list(range(count))


def test_the_order_of_a_seed_never_changes() -> None:
    assert shuffled(8, 42) == [1, 0, 6, 4, 7, 5, 3, 2]


def test_the_digest_tells_shapes_and_tokens_apart() -> None:
    tokens = torch.arange(16, dtype=torch.int32)
    digests = {window_digest(tokens.reshape(shape)) for shape in ((2, 8), (4, 4))} | {
        window_digest(tokens.flip(0).reshape(2, 8))
    }
    assert len(digests) == 3
    assert all(digest.startswith("sha256:") for digest in digests)


def test_too_little_text_says_how_much_there_is(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"has 12 tokens, but 2 windows of 8 need 16"):
        draw(write(tmp_path, {"text": "hello"}, {"text": "world"}), checkpoint)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not valid JSON"),
        ('"text"', "line 2 is neither text nor a conversation"),
        ("{}", "line 2 is neither"),
        ('{"text": ""}', "line 2 is neither"),
        ('{"text": 5}', "line 2 is neither"),
        ('{"messages": []}', "line 2 is neither"),
        ('{"messages": [{"role": "user"}]}', "line 2 is neither"),
        ('{"messages": ["hello"]}', "line 2 is neither"),
        ('{"text": "a", "messages": [{"role": "user", "content": "b"}]}', "line 2 is neither"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        load_records(write(tmp_path, {"text": "fine"}, line))


def test_blank_lines_pass_and_are_counted(tmp_path: Path) -> None:
    assert [record["line"] for record in load_records(write(tmp_path, "", {"text": "a"}, "", {"text": "b"}))] == [2, 4]


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="holds no records"):
        load_records(write(tmp_path, "", " "))
    with pytest.raises(InputRefused, match="cannot be read"):
        load_records(tmp_path / "absent.jsonl")


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputRefused, match=r"line 1 is a conversation, but .* no chat template"):
        draw(write(tmp_path, TALK), tmp_path)


def test_a_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="has no tokenizer"):
        draw(write(tmp_path, {"text": "a"}), tmp_path)
