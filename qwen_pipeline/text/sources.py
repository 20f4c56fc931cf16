"""Sources of text: a file of records, a directory, or a dataset of the Hugging Face hub.

A source is a sequence of records (:mod:`~qwen_pipeline.text.records`) that are read on request. Text and JSONL files
are read here; Parquet, directories and the hub through the optional dependency ``datasets``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from qwen_pipeline.checkpoint.digest_cache import directory_digest
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.text.records import PARQUET, SUFFIXES, is_record, load_records

_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(#(?P<split>\w+))?"
)
_SPLIT = "train"
_COLUMNS = 'Pass a dataset with a column "messages" of conversations or a column "text".'


class TextSource(Protocol):
    """A sequence of records in a fixed order.

    Attributes:
        name: The name of the file or directory, or the dataset's name on the hub.
    """

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def record(self, index: int, /) -> Mapping[str, Any]:
        """Read a record."""
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
    """A JSONL file, or a ``.txt`` file of one record."""

    file: Path

    @property
    def name(self) -> str:
        return self.file.name

    @cached_property
    def _records(self) -> list[Mapping[str, Any]]:
        return load_records(self.file)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int, /) -> Mapping[str, Any]:
        return self._records[index]

    def where(self, index: int, /) -> str:
        return f"{self.file} line {self._records[index]['line']}"

    def digest(self) -> str:
        return directory_digest({"records": self.file})


@dataclass(frozen=True)
class DatasetRows:
    """A ``datasets.Dataset``: memory-mapped Arrow files, of which only the requested rows are read."""

    name: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int, /) -> Mapping[str, Any]:
        row = self.rows[index]
        column = self._column
        record = {column: row[column]}
        if not is_record(record):
            raise InputRefused(f"{self.where(index)} has no {column}: {str(row[column])[:80]!r}.", remedy=_COLUMNS)
        return record

    def where(self, index: int, /) -> str:
        return f"{self.name} row {index}"

    def digest(self) -> str:
        files = (Path(file["filename"]) for file in self.rows.cache_files)
        return directory_digest({str(number): file for number, file in enumerate(files)})

    @property
    def _column(self) -> str:
        for column in ("messages", "text"):
            if column in self.rows.column_names:
                return column
        raise InputRefused(f"{self.name} has the columns {', '.join(self.rows.column_names)}.", remedy=_COLUMNS)


def _open_rows(path: Path) -> Any:
    """Open a Parquet file, a directory that ``save_to_disk`` wrote, or a directory of data files."""
    library = _library()
    if path.is_file():
        return _load_rows("parquet", split=_SPLIT, data_files=str(path))
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _one_split(str(path), library.load_from_disk(str(path)))
    return _load_rows(str(path), split=None)


def _load_rows(name: str, *, split: str | None, config: str | None = None, **more: Any) -> Any:
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
