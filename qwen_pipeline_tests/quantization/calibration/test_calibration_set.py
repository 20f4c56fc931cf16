"""Calibration windows: packing, masks, statistics and errors; they depend only on text, tokenizer and seed."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.calibration.calibration_set import CalibrationSet, draw_calibration, shuffled
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec, Packing
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


def draw(
    file: Path, checkpoint: Path, *, samples: int = 2, seq_len: int = 8, seed: int = 0, packing: Packing = "stream"
) -> CalibrationSet:
    spec = CalibrationSpec(samples=samples, seq_len=seq_len, seed=seed, packing=packing)
    return draw_calibration(file, checkpoint, spec)


def test_records_are_packed_back_to_back_with_an_end_after_text(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = write(tmp_path, {"text": "abcdef"}, {"text": "ghijkl"})
    drawn = draw(file, checkpoint, samples=2, seq_len=7)
    assert drawn.input_ids.dtype == torch.int32
    texts = [tokenizer.decode(row) for row in drawn.input_ids]
    assert sorted(texts) == ["abcdef<|im_end|>", "ghijkl<|im_end|>"]
    assert drawn.attention_mask.all()


def test_a_stream_marks_where_each_record_begins(checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, *({"text": "ab" * (n + 1)} for n in range(6)))
    drawn = draw(file, checkpoint, samples=3, seq_len=8)
    expected = [place for length in drawn.lengths for place in range(length)][:24]
    assert drawn.position_ids.flatten().tolist() == expected
    assert sum(drawn.lengths[:-1]) < 24 <= sum(drawn.lengths)


def test_documents_have_windows_of_their_own_and_filling_is_masked(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["abc", "defghijklmnop", "q"]
    drawn = draw(write(tmp_path, *({"text": t} for t in texts)), checkpoint, samples=4, seq_len=8, packing="documents")
    rows = [row[mask.bool()] for row, mask in zip(drawn.input_ids, drawn.attention_mask, strict=True)]
    assert sorted(tokenizer.decode(row) for row in rows) == [
        "abc<|im_end|>", "defghijk", "lmnop<|im_end|>", "q<|im_end|>",
    ]  # fmt: skip
    filling = drawn.input_ids[~drawn.attention_mask.bool()]
    assert filling.unique().tolist() == [tokenizer.pad_token_id]
    assert drawn.statistics()["padding_share"] == pytest.approx(1 - 20 / 32)
    assert drawn.tokens == sum(drawn.lengths) == 20


def test_statistics_count_every_record_once(checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, *({"text": "x" * n} for n in (3, 15, 16, 40, 60)))
    found = draw(file, checkpoint, samples=4, seq_len=32).statistics()
    assert found["tokens"] == 128
    assert found["padding_share"] == 0
    assert sum(each["records"] for each in found["record_tokens_histogram"]) == found["records"] == 5
    assert found["record_tokens_histogram"] == [
        {"up_to": 16, "records": 2}, {"up_to": 32, "records": 1}, {"up_to": 64, "records": 2},
    ]  # fmt: skip
    assert found["record_tokens"] == {"least": 4, "median": 17, "most": 61}


def test_a_conversation_is_written_by_the_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(TALK["messages"], tokenize=True, return_dict=False)
    drawn = draw(write(tmp_path, TALK), checkpoint, samples=1, seq_len=len(expected))
    assert drawn.input_ids[0].tolist() == expected


def test_the_draw_neither_uses_nor_changes_the_global_random_state(checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, *({"text": f"record number {i}"} for i in range(9)))
    torch.manual_seed(1)
    random.seed(1)
    first = draw(file, checkpoint, samples=9, seq_len=16)
    after = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    assert (torch.rand(1), random.random()) == after
    assert draw(file, checkpoint, samples=9, seq_len=16).digest == first.digest
    assert draw(file, checkpoint, samples=9, seq_len=16, seed=1).digest != first.digest


GOLDEN = {
    ("text.jsonl", "stream"): "sha256:4ece4b5830a0d40ca0835826a1e654dfaa8039e0fb0c2e53435b2e471866b84a",
    ("text.jsonl", "documents"): "sha256:23c61b424148f3fc57a580ad92a1805ec1eeaf2c0e9181ddcdaa9dd6f8180bbb",
    ("mixed.jsonl", "stream"): "sha256:313f7885cd05578c119c1f4a2d3ea57aa932baa631c1a75b5a6721ecaff3c1df",
    ("mixed.jsonl", "documents"): "sha256:9a1a141c26e606ebeefcc040a11f1eba5e8964b8efa1c522611fde6a5e158421",
    ("crlf.jsonl", "stream"): "sha256:313f7885cd05578c119c1f4a2d3ea57aa932baa631c1a75b5a6721ecaff3c1df",
    ("crlf.jsonl", "documents"): "sha256:9a1a141c26e606ebeefcc040a11f1eba5e8964b8efa1c522611fde6a5e158421",
    ("space.jsonl", "stream"): "sha256:a8e180f1430602d013d62bc8ebda7375266dccf4f92f441f4b66f80443c9af03",
    ("lines.txt", "stream"): "sha256:667c546ece7ba103841427ae360c4501e444094b25b0860ac2798da4990deb68",
}
"""The digests of calibrations as they were before records had other forms than texts and messages."""


def golden_file(name: str) -> bytes:
    texts: list[dict[str, Any]] = [{"text": f"record {n} " * (n + 1)} for n in range(20)]
    talks = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n}, Grüße \u2028 end."},
            ]
        }
        for n in range(20)
    ]
    mixed = [text if n % 2 else talk for n, (text, talk) in enumerate(zip(texts, talks, strict=True))]
    return {
        "text.jsonl": "\n".join(map(json.dumps, texts)),
        "mixed.jsonl": "\n\n".join(json.dumps(record, ensure_ascii=False) for record in mixed),
        "crlf.jsonl": "\r\n".join(map(json.dumps, mixed)),
        "space.jsonl": "\n".join(json.dumps({"text": text}) for text in (" ", "a b c" * 20)),
        "lines.txt": "first line\r\nsecond line\rthird\n" * 9,
    }[name].encode()


@pytest.mark.parametrize(("name", "packing"), GOLDEN)
def test_texts_that_were_read_before_give_the_same_tokens(
    name: str, packing: Packing, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(golden_file(name))
    drawn = draw(file, checkpoint, samples=4, seq_len=24, seed=5, packing=packing)
    assert drawn.digest == GOLDEN[name, packing]
    assert str(drawn.records).startswith("All ")


@given(count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_shuffling_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(shuffled(count, seed)) == list(range(count))


def test_the_order_of_a_seed_never_changes() -> None:
    assert shuffled(8, 42) == [1, 0, 6, 4, 7, 5, 3, 2]


def test_the_digest_depends_on_shapes_masks_and_tokens(checkpoint: Path, tmp_path: Path) -> None:
    drawn = draw(write(tmp_path, {"text": "abcdefghijklmnop"}), checkpoint)
    others = [
        replace(drawn, input_ids=drawn.input_ids.flip(1)),
        replace(drawn, attention_mask=drawn.attention_mask * torch.tensor([1] * 7 + [0], dtype=torch.uint8)),
        replace(drawn, **{name: tensor.reshape(4, 4) for name, tensor in drawn.tensors.items()}),
    ]
    assert len({drawn.digest, *(other.digest for other in others)}) == 4


def test_too_little_text_is_refused_with_its_amount(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"has 12 tokens, but 2 windows of 8 need 16"):
        draw(write(tmp_path, {"text": "hello"}, {"text": "world"}), checkpoint)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputRefused, match=r"line 1 is a conversation, but .* no chat template"):
        draw(write(tmp_path, TALK), tmp_path)


def test_a_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="has no tokenizer"):
        draw(write(tmp_path, {"text": "a"}), tmp_path)
