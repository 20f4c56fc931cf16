"""The lines of a file that may be larger than the memory, and have lines that are too."""

import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from qwen_pipeline.errors import InputRefused

MAX_LINE_BYTES = 64_000_000
"""The longest line that is read, and the longest text."""
MAX_FILE_BYTES = 100_000_000_000
_PIECE = 2**20
_ENDS = re.compile(rb"\r\n|\r|\n")


class Lines:
    """The lines that are not blank, found by one pass with the memory of one piece.

    Args:
        file: The file.
        start: The offset of its first line, after a byte order mark.

    Raises:
        OSError: It cannot be read.
        InputRefused: It is too long, or no text.
    """

    def __init__(self, file: Path, start: int) -> None:
        self._file = file
        self._identity = _identity(file.stat())
        self._spans = array("Q")
        """Number, first byte and end of each line."""
        if self._identity[0] > MAX_FILE_BYTES:
            raise InputRefused(
                f"{file} has {self._identity[0]:,} bytes, but at most {MAX_FILE_BYTES:,} are read.",
                remedy="Pass a part of it: far less text is needed.",
            )
        for span in _filled(file, start):
            self._spans.extend(span)

    def __len__(self) -> int:
        return len(self._spans) // 3

    def number(self, index: int) -> int:
        """Return the number of a line, from 1, blank ones counted."""
        return self._spans[3 * index]

    def length(self, index: int) -> int:
        """Return the length of a line in bytes."""
        return self._spans[3 * index + 2] - self._spans[3 * index + 1]

    def read(self, index: int) -> bytes:
        """Read a line.

        Raises:
            InputRefused: The file was changed since its lines were found.
        """
        with self._file.open("rb") as stream:
            if _identity(os.fstat(stream.fileno())) != self._identity:
                raise InputRefused(
                    f"{self._file} was changed while it was read.", remedy="Run again when the file is complete."
                )
            stream.seek(self._spans[3 * index + 1])
            return stream.read(self.length(index))


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _filled(file: Path, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, the first byte and the end of each line that is not blank."""
    number, begin, end, is_filled = 1, start, start, False
    for offset, piece in _pieces(file, start):
        at = 0
        for match in _ENDS.finditer(piece):
            if is_filled or piece[at : match.start()].strip():
                yield number, begin, offset + match.start()
            number, begin, at, is_filled = number + 1, offset + match.end(), match.end(), False
        is_filled, end = is_filled or bool(piece[at:].strip()), offset + len(piece)
    if is_filled:
        yield number, begin, end


def _pieces(file: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a file and their offsets; none ends between the two bytes of a line end."""
    with file.open("rb") as stream:
        stream.seek(start)
        offset = start
        while piece := stream.read(_PIECE):
            piece += stream.read(1) if piece.endswith(b"\r") else b""
            if not piece.strip(b"\0"):
                raise InputRefused(
                    f"{file} has {len(piece):,} zero bytes from byte {offset:,} on: it is no text.",
                    remedy="Write it again: it may have been cut off, or its file system may be damaged.",
                )
            yield offset, piece
            offset += len(piece)
