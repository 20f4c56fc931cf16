"""Files are shared where that is allowed, and never with a file that may change."""

import json
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.files import clone_file, copy_file, parse_json, share_file
from qwen_pipeline.checkpoint.lazy import LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def clones(sharded: Path, tmp_path: Path) -> bool:
    """Return whether this disk supports copy-on-write clones, so that hard links are not needed."""
    return clone_file(sharded / FIRST, tmp_path / "probe")


@pytest.mark.parametrize("allowed", [True, False])
def test_an_unchanged_shard_is_a_hard_link_only_if_that_is_allowed(
    sharded: Path, tmp_path: Path, clones: bool, allowed: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    contents = write_checkpoint(open_checkpoint(sharded), out, task="", hard_links=allowed)
    for shard in (FIRST, SECOND):
        assert (out / shard).samefile(sharded / shard) == (allowed and not clones)
    assert contents.tensors.keys() == open_checkpoint(out).keys()


def test_a_changed_shard_is_never_a_hard_link(sharded: Path, tmp_path: Path) -> None:
    source, out = open_checkpoint(sharded), tmp_path / "out"
    before = (sharded / FIRST).read_bytes()
    zeros = LazyTensor(
        spec=source["a.weight"], read=lambda start, stop: torch.zeros(stop - start, 5, dtype=torch.bfloat16)
    )
    out.mkdir()
    write_checkpoint(source.replace(tensors={"a.weight": zeros}), out, task="", hard_links=True)

    assert not (out / FIRST).samefile(sharded / FIRST)
    assert (sharded / FIRST).read_bytes() == before
    assert not open_checkpoint(out).load("a.weight").any()


def test_a_copy_does_not_change_with_its_source(sharded: Path, tmp_path: Path) -> None:
    before, copy = (sharded / FIRST).read_bytes(), tmp_path / "deep" / "copy"
    copy_file(sharded / FIRST, copy)
    assert not copy.samefile(sharded / FIRST)
    copy.write_bytes(b"changed")
    assert (sharded / FIRST).read_bytes() == before


def test_without_clones_and_hard_links_nothing_is_shared(sharded: Path, tmp_path: Path, clones: bool) -> None:
    assert share_file(sharded / FIRST, tmp_path / "shared", hard_links=False) == clones
    assert (tmp_path / "shared").exists() == clones


def test_an_unfinished_file_with_another_hard_link_is_not_written_into(sharded: Path, tmp_path: Path) -> None:
    """The temporary file of an interrupted attempt may be a hard link to another file."""
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(open_checkpoint(sharded), out, task="")
    (out / FIRST).rename(tmp_path / "precious")
    (out / f"{FIRST}.tmp").hardlink_to(tmp_path / "precious")
    damaged = bytearray((tmp_path / "precious").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "precious").write_bytes(damaged)

    write_checkpoint(open_checkpoint(sharded), out, task="")

    assert (tmp_path / "precious").read_bytes() == damaged
    assert not (out / FIRST).samefile(tmp_path / "precious")


@pytest.mark.parametrize("text", [r'{"a": "\ud83d\ude00"}', r'{"a": "\\ud83d"}', '{"a": "\N{GRINNING FACE}"}'])
def test_texts_of_json_can_be_written_again(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_is_utf_8_without_a_mark(encoding: str) -> None:
    """Transformers reads nothing else."""
    with pytest.raises(ValueError, match=r"BOM|can't decode|Expecting value"):
        parse_json('{"a": 1}'.encode(encoding))


@pytest.mark.parametrize("text", [r'{"a": "\ud83d"}', r'{"\uDE00": 1}', r'[["\ude00\ud83d"]]'])
def test_half_of_a_surrogate_pair_is_no_text(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            parse_json(data)
