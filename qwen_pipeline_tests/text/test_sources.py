"""JSONL, Parquet, saved datasets and directories give the same records; errors name what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.text import sources
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


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a" * 10_000_000]}), file, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(sources, "MAX_UNPACKED_BYTES", 1_000_000)
    assert file.stat().st_size < 100_000
    with pytest.raises(InputRefused, match=r"bomb.parquet unpacks to 10,000,0.. bytes in 1 rows"):
        open_text(file)


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
        open_text(tmp_path / "other.parquet")


def test_null_fields_of_rows_are_left_out_at_every_depth(tmp_path: Path) -> None:
    """Arrow fills the fields of every object of a column; templates would see arguments that nobody wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": "Oslo"}, {"days": 3})]
    rows = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "text": None, "score": 1.0}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist([*rows, {"text": "a"}]), tmp_path / "rows.parquet")
    text = open_text(tmp_path / "rows.parquet")
    messages = [{"role": "assistant", "tool_calls": [call]} for call in calls]
    assert [text.record(n) for n in range(3)] == [*({"messages": [message]} for message in messages), {"text": "a"}]
    assert text.where(2) == "rows.parquet row 2"


def test_images_of_rows_are_not_decoded(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    image = {"bytes": b"not an image", "path": None}
    features = Features({"text": Value("string"), "image": Image()})
    Dataset.from_dict({"text": ["a", "b"], "image": [image, None]}, features).save_to_disk(str(tmp_path / "saved"))
    text = open_text(tmp_path / "saved")
    assert [sorted(text.record(n)) for n in range(2)] == [["image", "text"], ["text"]]


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "dataset_dict.json", "data.parquet", "data.jsonl", "config.json"]
)
def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / name).write_text("{")
    with pytest.raises(InputRefused, match=r"cannot be read as a dataset|has the columns"):
        open_text(tmp_path / "directory")


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
