"""Sources of text: a file of records, a directory, or a dataset of the Hugging Face hub.

A source is a sequence of records (:mod:`~qwen_pipeline.text.records`) that are read on request. Text and JSONL files
are read here; Parquet, directories and the hub through the optional dependency ``datasets``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from qwen_pipeline.checkpoint.digest_cache import directory_digest
from qwen_pipeline.checkpoint.files import require_regular
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.text.record_files import PARQUET, SUFFIXES, StoredRecord, load_records
from qwen_pipeline.text.records import FIELDS, FORMS, MEDIA, BadRecord

_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(#(?P<split>\w+))?"
)
_SPLIT = "train"
MAX_UNPACKED_BYTES, MAX_ROWS = 100_000_000_000, 1_000_000_000
_COLUMNS = "Pass a dataset with a column messages, text or conversations, or other columns that docs/text.md lists."


class TextSource(Protocol):
    """A sequence of records in a fixed order.

    Attributes:
        name: The name of the file or directory, or the dataset's name on the hub.
    """

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def record(self, index: int, /) -> Mapping[str, Any]:
        """Read a record's fields.

        Raises:
            BadRecord: It cannot be read.
        """
        ...

    def where(self, index: int, /) -> str:
        """Return the location of a record, for error messages."""
        ...

    def digest(self) -> str:
        """Return a digest of the files that hold the records."""
        ...


def open_text(source: str | Path) -> TextSource:
    """Open a source of text.

    Args:
        source: A file of records (``.jsonl``, ``.txt``), a ``.parquet`` file, a directory that ``save_to_disk`` wrote
            or whose files ``datasets`` can read, or ``name[:config][@revision][#split]`` of a dataset on the hub.

    Raises:
        InputRefused: The source neither exists nor is the name of a dataset, or it has no records.
        EnvironmentFault: The library ``datasets`` is needed and not installed, or the hub cannot be reached.
    """
    path = Path(source)
    if path.is_file() and path.suffix != PARQUET:
        return RecordFile(path)
    if path.exists():
        return DatasetRows(path.name, _open_rows(path))
    named = _HUB_NAME.fullmatch(str(source))
    if not named or path.suffix in SUFFIXES:
        raise InputRefused(
            f"{source} does not exist.",
            remedy="Pass a file of records, a directory, or a dataset of the hub: name[:config][@revision][#split].",
        )
    return DatasetRows(
        str(source), _load_rows(named["name"], split=named["split"], **_matched(named, "config", "revision"))
    )


@dataclass(frozen=True)
class RecordFile:
    """A JSONL file, a JSON array, or a ``.txt`` file of one record."""

    file: Path

    @property
    def name(self) -> str:
        return self.file.name

    @cached_property
    def _records(self) -> Sequence[StoredRecord]:
        return load_records(self.file)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int, /) -> Mapping[str, Any]:
        return self._records[index].fields

    def where(self, index: int, /) -> str:
        return f"{self.file.name} {self._records[index].place}"

    def digest(self) -> str:
        return directory_digest({"records": self.file})


@dataclass(frozen=True)
class DatasetRows:
    """A ``datasets.Dataset``: memory-mapped Arrow files, of which only the requested rows are read.

    Raises:
        InputRefused: No form of records has only columns of the dataset.
    """

    name: str
    rows: Any

    def __post_init__(self) -> None:
        columns: list[str] = self.rows.column_names
        if not any(form.kinds.keys() <= set(columns) for form in FORMS):
            raise InputRefused(f"{self.name} has the columns {', '.join(columns)}.", remedy=_COLUMNS)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _views(self) -> list[Any]:
        """The columns that hold text, and the other known ones, whose images and sounds are not decoded."""
        known = [name for name in self.rows.column_names if name in FIELDS]
        text = self.rows.select_columns([name for name in known if name not in MEDIA])
        media = [name for name in known if name in MEDIA]
        return [text, *([self.rows.select_columns(media).with_format("arrow")] if media else [])]

    def record(self, index: int, /) -> Mapping[str, Any]:
        try:
            rows = [view[index] for view in self._views]
            fields = {name: value for row in rows for name, value in _as_fields(row).items()}
        except Exception as error:
            raise BadRecord("cannot be read", f"{error} ({type(error).__name__})") from error
        return _without_nulls(fields)

    def where(self, index: int, /) -> str:
        return f"{self.name} row {index}"

    def digest(self) -> str:
        files = (Path(file["filename"]) for file in self.rows.cache_files)
        return directory_digest({str(number): file for number, file in enumerate(files)})


def _as_fields(row: Any) -> dict[str, Any]:
    return row if isinstance(row, dict) else row.to_pylist()[0]


def _without_nulls(value: Any) -> Any:
    """Remove the null fields of objects: in Arrow, every object of a column has the fields of all of them."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _without_nulls(each) for name, each in fields.items() if each is not None}
    return list(map(_without_nulls, cast("list[Any]", value))) if isinstance(value, list) else value


def _open_rows(path: Path) -> Any:
    """Open a Parquet file, a directory that ``save_to_disk`` wrote, or a directory of data files.

    Raises:
        InputRefused: The library cannot read it.
    """
    library = _library()
    try:
        _require_bounded(path)
        if path.is_file():
            loaded = library.load_dataset("parquet", split=_SPLIT, data_files=str(path))
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = library.load_from_disk(str(path))
        else:
            loaded = library.load_dataset(str(path))
    except (InputRefused, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise InputRefused(
            f"{path} cannot be read as a dataset: {cause} ({type(cause).__name__})",
            remedy="Pass a Parquet file, a directory that save_to_disk wrote, one that holds only data files, or"
            " convert the text to JSONL.",
        ) from error
    return _one_split(str(path), loaded)


def _require_bounded(path: Path) -> None:
    """Require that Parquet files unpack to a size that a disk has: a few kilobytes can stand for terabytes.

    Raises:
        InputRefused: They do not; the message names the file.
    """
    from pyarrow import parquet

    for file in [path] if path.is_file() else path.rglob(f"*{PARQUET}"):
        require_regular(file, refused=InputRefused)
        metadata = parquet.read_metadata(file)
        unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if unpacked > MAX_UNPACKED_BYTES or metadata.num_rows > MAX_ROWS:
            raise InputRefused(
                f"{file} unpacks to {unpacked:,} bytes in {metadata.num_rows:,} rows, but at most"
                f" {MAX_UNPACKED_BYTES:,} and {MAX_ROWS:,} are read.",
                remedy="Pass a part of it: far less text is needed.",
            )


def _load_rows(name: str, *, split: str | None, config: str | None = None, **more: Any) -> Any:
    """Load a dataset of the hub.

    Raises:
        InputRefused: There is no such dataset, configuration, revision or split.
        EnvironmentFault: The hub cannot be reached.
    """
    library = _library()
    try:
        return _one_split(name, library.load_dataset(name, config, split=split, **more))
    except library.exceptions.DatasetNotFoundError as error:
        raise InputRefused(f"There is no dataset {name}: {error}", remedy="Correct its name, or log in.") from error
    except (library.exceptions.DatasetsError, ValueError) as error:
        raise InputRefused(f"The dataset {name} cannot be loaded: {error}", remedy="Correct its name.") from error
    except OSError as error:
        raise EnvironmentFault(
            f"The dataset {name} cannot be fetched: {error}",
            remedy="Check the connection to the hub, or pass a local copy.",
        ) from error


def _one_split(name: str, loaded: Any) -> Any:
    """Return the only split, or the training split."""
    if hasattr(loaded, "column_names") and not isinstance(loaded, dict):
        return loaded
    splits = cast("dict[str, Any]", loaded)
    if len(splits) == 1:
        return next(iter(splits.values()))
    if _SPLIT in splits:
        return splits[_SPLIT]
    raise InputRefused(f"{name} has the splits {', '.join(splits)}.", remedy=f"Pass one of them: {name}#<split>")


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise EnvironmentFault(
            "Parquet files, directories and datasets of the hub need the library datasets, which is missing.",
            remedy="Install it: pip install 'qwen-pipeline[datasets]', or use JSONL.",
        ) from error


def _matched(named: re.Match[str], *fields: str) -> dict[str, str]:
    return {field: named[field] for field in fields if named[field]}
