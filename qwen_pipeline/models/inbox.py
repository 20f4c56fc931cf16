"""The inbox of uploaded fine-tunes: one directory for each, which is complete or has an obstacle.

An upload is complete if no file has the suffix of a partial one, every safetensors file is as long as its header says,
and either it has not changed since the last tick of the sensor, or the uploader wrote the file ``.complete`` into it
after all other files.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.digest_cache import directory_digest
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.errors import DestinationRefused, InputRefused, PipelineError
from qwen_pipeline.models.kinds import Kind, recognize
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET

MARKER = ".complete"
PARTIAL_SUFFIXES = (".part", ".partial", ".tmp", ".incomplete", ".crdownload", ".aria2")

READ_BYTES = 4 * 2**30
"""The largest upload whose bytes identify it; a larger one is identified by the stats of its files."""
_INDEX = ".safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def require_name(name: str) -> str:
    """Return a fine-tune's name if it is safe as a partition key, a directory and a command-line argument.

    Raises:
        InputRefused: The name is not safe.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.startswith((".", "-")):
        raise InputRefused(
            f"{name[:120]!r} cannot be the name of a fine-tune.",
            remedy="Rename it: use 1 to 100 characters of A-Z a-z 0-9 . _ -, do not begin with a dot or a hyphen, and"
            " do not write two dots in a row.",
        )
    return name


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The reason why a directory is not a complete fine-tune.

    Attributes:
        is_incomplete: Whether it may vanish by itself, because the upload may still be going on.
        remedy: What to do about it.
    """

    reason: str
    is_incomplete: bool = False
    remedy: str = "Complete or correct the upload."


@dataclass(frozen=True)
class Arrival:
    """A directory in the inbox, complete or not."""

    name: str
    path: Path

    @cached_property
    def stats(self) -> dict[str, os.stat_result]:
        """Relative path -> stat of each file, sorted, without the marker ``.complete``; no file is read."""
        found = dict(_stats_below(str(self.path), ""))
        return {relative: found[relative] for relative in sorted(found) if relative != MARKER}

    @property
    def files(self) -> dict[str, Path]:
        """Relative path -> file, sorted, without the marker ``.complete``."""
        return {relative: self.path / relative for relative in self.stats}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files' stats, which changes when a file is added, removed or written; no file is read."""
        stats = self.stats.items()
        return canonical_sha256([[relative, s.st_size, s.st_mtime_ns, s.st_ino] for relative, s in stats])

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over names and bytes of all files. Each file is read once; its digest is cached."""
        return directory_digest(self.files)

    @property
    def identity(self) -> str:
        """The digest; of a large upload, which would be read for this alone, ``files:<fingerprint>``."""
        return self.digest if self.nbytes <= READ_BYTES else f"files:{self.fingerprint}"

    @property
    def nbytes(self) -> int:
        return sum(stat.st_size for stat in self.stats.values())

    @property
    def is_marked_complete(self) -> bool:
        marker = self.path / MARKER
        if not marker.is_file():
            return False
        return all(path.stat().st_mtime_ns <= marker.stat().st_mtime_ns for path in self.files.values())

    def obstacle(self) -> str | None:
        """Return the reason why the directory is not a complete fine-tune, or None."""
        found = self.find_obstacle()
        return found.reason if found else None

    def find_obstacle(self) -> "Obstacle | None":
        """Return the first obstacle, or None."""
        try:
            require_name(self.name)
            return next(self._obstacles(), None)
        except PipelineError as fault:
            return Obstacle(fault.what, remedy=fault.remedy)
        except OSError as error:
            return Obstacle(f"it cannot be read: {error}", is_incomplete=True)

    def _obstacles(self) -> "Iterator[Obstacle]":
        if irregular := self._irregular():
            yield Obstacle(f"{irregular} is neither a regular file nor a directory")
        yield from (
            Obstacle(f"{relative} is a link to a file outside of the directory")
            for relative, path in self.files.items()
            if self._leads_outside(path)
        )
        found = recognize(self.path)
        if (refusal := found.refusal) and not found.kind.is_incomplete:
            yield Obstacle(f"it is {found.kind.name}: {refusal[0]}", remedy=refusal[1])
        yield from (Obstacle(reason, is_incomplete=True) for reason in self._gaps(found.kind))

    def _gaps(self, kind: Kind) -> Iterator[str]:
        """Yield what is missing of an upload that may still be going on."""
        yield from (f"{path} is still being written" for path in self.files if path.endswith(PARTIAL_SUFFIXES))
        if kind.refusal:
            yield f"it is {kind.name}: {kind.refusal[0]}"
        if not {ADAPTER_CONFIG, ADAPTER_SET, CONFIG} & self.files.keys():
            yield f"it has none of {ADAPTER_CONFIG}, {ADAPTER_SET} and {CONFIG}"
        weights = [path for relative, path in self.files.items() if relative.endswith(".safetensors")]
        if not weights:
            yield "it has no *.safetensors file"
        for path in weights:
            try:
                open_safetensors(path)
            except PipelineError as fault:
                yield fault.what
        missing = (shard for index in self._indexes() for shard in _shards(index) if shard not in self.files)
        yield from (f"it has no {shard}, which an index names" for shard in missing)

    def _indexes(self) -> Iterator[Path]:
        return (path for relative, path in self.files.items() if "/" not in relative and relative.endswith(_INDEX))

    def _irregular(self) -> str | None:
        """Return the first entry that cannot be read like a file, such as a FIFO or a link to nothing."""
        found = (path for path in sorted(self.path.rglob("*")) if not path.is_file() and not path.is_dir())
        return next((path.relative_to(self.path).as_posix() for path in found), None)

    def _leads_outside(self, path: Path) -> bool:
        return not path.resolve().is_relative_to(self.path.resolve())


def _stats_below(directory: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (relative path, stat) of each regular file; links to files are followed, those to directories are not."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _stats_below(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat()


def _shards(index: Path) -> set[str]:
    """Return the names of the files that an index names."""
    owners = load_json(index).get("weight_map")
    return {str(file) for file in cast("dict[str, Any]", owners).values()} if isinstance(owners, dict) else set()


@dataclass(frozen=True, slots=True)
class Inbox:
    """The fine-tunes in the subdirectories of one root."""

    root: Path

    def arrivals(self) -> Iterator[Arrival]:
        """Yield every directory, complete or not, in the order of names; hidden directories are skipped."""
        if self.root.is_dir():
            for path in sorted(self.root.iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield Arrival(path.name, path)

    def find(self, name: str) -> Arrival:
        """Return the fine-tune of this name, complete or not.

        Raises:
            InputRefused: The inbox has no such directory, or the name is not safe.
        """
        arrival = Arrival(require_name(name), self.root / name)
        if arrival.path.is_dir():
            return arrival
        known = ", ".join(other.name for other in self.arrivals()) or "none"
        raise InputRefused(
            f"There is no fine-tune {name!r} in {self.root}; it has: {known}.",
            remedy=f"Copy its directory to {arrival.path}, or pass its path instead of a name.",
        )

    def require(self, name: str) -> Arrival:
        """Return the fine-tune of this name, which must be complete.

        Raises:
            InputRefused: The inbox has no such directory, or it is not complete.
        """
        arrival = self.find(name)
        if obstacle := arrival.obstacle():
            raise InputRefused(
                f"{arrival.path} is not complete: {obstacle}.", remedy="Complete the upload, then run again."
            )
        return arrival

    def link(self, directory: Path) -> Arrival:
        """Link a directory elsewhere into the inbox under its own name, and return it.

        Raises:
            DestinationRefused: The inbox has another fine-tune of that name.
            InputRefused: The name is not safe, or the fine-tune is not complete.
        """
        path = self.root / require_name(directory.resolve().name)
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            path.symlink_to(directory.resolve())
        elif path.resolve() != directory.resolve():
            raise DestinationRefused(
                f"{path} exists and is not {directory}.",
                remedy=f"Rename one of them, or run the one in the inbox: qwen-pipeline run {path.name}",
            )
        return self.require(path.name)
