"""Where fine-tunes arrive: one directory each, named for the fine-tune, seen as complete or with a reason why not.

An upload is complete when nothing in it is marked as partial, every safetensors file is as long as its header says, and
either it has not changed since the last look, or its sender put the file ``.complete`` into it after everything else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import directory_digest
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.checkpoint.manifest import canonical_sha256
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.errors import DestinationRefused, InputRefused, PipelineError
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET

MARKER = ".complete"
PARTIAL_SUFFIXES = (".part", ".partial", ".tmp", ".incomplete", ".crdownload", ".aria2")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def require_name(name: str) -> str:
    """Return a fine-tune's name if it is safe as a partition key, a directory and an argument.

    Raises:
        InputRefused: It is not.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.startswith((".", "-")):
        raise InputRefused(
            f"{name[:120]!r} cannot be the name of a fine-tune.",
            remedy="Rename it: 1 to 100 of A-Z a-z 0-9 . _ -, first a letter or a digit, without two dots in a row.",
        )
    return name


@dataclass(frozen=True)
class Arrival:
    """A directory in the inbox, as it is at this moment."""

    name: str
    path: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """Relative path -> file, sorted, without the marker."""
        found = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*") if path.is_file()}
        return {relative: found[relative] for relative in sorted(found) if relative != MARKER}

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a file is added, removed or written to; costs no reading."""
        stats = [(relative, path.stat()) for relative, path in self.files.items()]
        return canonical_sha256([[relative, s.st_size, s.st_mtime_ns, s.st_ino] for relative, s in stats])

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` of names and bytes of all files. Read once per file, remembered after that."""
        return directory_digest(self.files)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def is_marked_complete(self) -> bool:
        marker = self.path / MARKER
        if not marker.is_file():
            return False
        return all(path.stat().st_mtime_ns <= marker.stat().st_mtime_ns for path in self.files.values())

    def obstacle(self) -> str | None:
        """Say why this cannot be taken as it is, or None."""
        try:
            require_name(self.name)
            if foreign := [relative for relative, path in self.files.items() if self._leads_out(path)]:
                return f"{foreign[0]} is a link to a file outside of the directory"
            if partial := [relative for relative in self.files if relative.endswith(PARTIAL_SUFFIXES)]:
                return f"{partial[0]} is still being written"
            if not {ADAPTER_CONFIG, ADAPTER_SET, CONFIG} & self.files.keys():
                return f"none of {ADAPTER_CONFIG}, {ADAPTER_SET} and {CONFIG} is there"
            weights = [path for relative, path in self.files.items() if relative.endswith(".safetensors")]
            if not weights:
                return "no *.safetensors file is there"
            for path in weights:
                open_safetensors(path)
        except PipelineError as fault:
            return fault.what
        except OSError as error:
            return f"it cannot be read: {error}"
        return None

    def _leads_out(self, path: Path) -> bool:
        return not path.resolve().is_relative_to(self.path.resolve())


@dataclass(frozen=True, slots=True)
class Inbox:
    """All fine-tunes below one root."""

    root: Path

    def arrivals(self) -> Iterator[Arrival]:
        """Every directory there is, complete or not, in the order of names; hidden ones are nobody's."""
        if self.root.is_dir():
            for path in sorted(self.root.iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield Arrival(path.name, path)

    def find(self, name: str) -> Arrival:
        """Return a fine-tune that must be there, complete or not.

        Raises:
            InputRefused: It is not, or the name cannot be one.
        """
        arrival = Arrival(require_name(name), self.root / name)
        if arrival.path.is_dir():
            return arrival
        known = ", ".join(other.name for other in self.arrivals()) or "nothing"
        raise InputRefused(
            f"There is no fine-tune {name!r} in {self.root}, which holds {known}.",
            remedy=f"Copy its directory to {arrival.path}, or give its path instead of a name.",
        )

    def require(self, name: str) -> Arrival:
        """Return a fine-tune that must be there and complete.

        Raises:
            InputRefused: It is not.
        """
        arrival = self.find(name)
        if obstacle := arrival.obstacle():
            raise InputRefused(
                f"{arrival.path} is not complete: {obstacle}.", remedy="Finish the upload, then run again."
            )
        return arrival

    def admit(self, directory: Path) -> Arrival:
        """Make a directory elsewhere a fine-tune of its own name, by a link."""
        place = self.root / require_name(directory.resolve().name)
        if not place.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            place.symlink_to(directory.resolve())
        elif place.resolve() != directory.resolve():
            raise DestinationRefused(
                f"{place} is another fine-tune than {directory}.",
                remedy=f"Rename one of them, or run the one in the inbox: qwen-pipeline run {place.name}",
            )
        return self.require(place.name)
