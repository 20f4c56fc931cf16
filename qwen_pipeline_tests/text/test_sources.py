"""JSONL, Parquet, saved datasets and directories give the same records; errors name what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.text.sources import open_text

TALKS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}]}
    for n in range(5)
]


@pytest.fixture(autouse=True)
def _offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


def jsonl(root: Path) -> Path:
    file = root / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, TALKS)))
    return file


def parquet(root: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = root / "talks.parquet"
    pq.write_table(pa.Table.from_pylist([talk | {"id": n} for n, talk in enumerate(TALKS)]), file)
    return file


def saved(root: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(TALKS).save_to_disk(str(root / "saved"))
    return root / "saved"


def saved_splits(root: Path) -> Path:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict([("test", Dataset.from_list(TALKS[:1])), ("train", Dataset.from_list(TALKS))])
    splits.save_to_disk(str(root / "saved"))
    return root / "saved"


def directory(root: Path) -> Path:
    (root / "files").mkdir()
    return parquet(root).rename(root / "files" / "train-00000-of-00001.parquet").parent


@pytest.mark.parametrize("make", [jsonl, parquet, saved, saved_splits, directory])
def test_every_source_gives_the_same_records(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    text = open_text(make(tmp_path))
    assert len(text) == len(TALKS)
    assert [text.record(n)["messages"] for n in range(len(text))] == [talk["messages"] for talk in TALKS]
    assert str(3 + (make is jsonl)) in text.where(3)


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    first = open_text(jsonl(tmp_path)).digest()
    (tmp_path / "again").mkdir()
    copy = jsonl(tmp_path / "again")
    assert open_text(copy).digest() == first
    copy.write_text(copy.read_text().replace("What", "Who"))
    assert open_text(copy).digest() != first


def test_columns_without_text_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "score": [1.0]}), tmp_path / "other.parquet")
    with pytest.raises(InputRefused, match="columns prompt, score"):
        open_text(tmp_path / "other.parquet").record(0)


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "holes.parquet")
    with pytest.raises(InputRefused, match=r"holes\.parquet row 1 has no text"):
        open_text(tmp_path / "holes.parquet").record(1)


def test_without_a_training_split_a_split_must_be_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict([("train_sft", Dataset.from_list(TALKS)), ("test_sft", Dataset.from_list(TALKS))])
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputRefused, match="splits train_sft, test_sft"):
        open_text(tmp_path / "saved")


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "/nowhere/at/all", "two words"])
def test_a_source_that_neither_exists_nor_is_a_name_is_refused(name: str) -> None:
    with pytest.raises(InputRefused, match="does not exist"):
        open_text(name)


@pytest.mark.parametrize("name", ["owner/name", "owner/name:config@main#train_sft", "imdb"])
def test_a_hub_that_cannot_be_reached_is_an_environment_fault(name: str) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be fetched"):
        open_text(name)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"library datasets, which is missing") as fault:
        open_text(file)
    assert "qwen-pipeline[datasets]" in fault.value.remedy
