"""The cursor of an inbox's sensor: what it saw of each upload at its last tick."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One upload at the last tick.

    Attributes:
        fingerprint: The stats of its files.
        taken: The rules by which its runs were requested; None if they were not.
    """

    fingerprint: str
    taken: str | None = None

    def replace(self, **changes: Any) -> "Upload":
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The state of a sensor between two ticks.

    Attributes:
        uploads: Name -> upload.
        device: The file system that the inbox was on; None before the first tick.
        quarantine: Digest of the quarantined uploads that were last reported.
    """

    uploads: Mapping[str, Upload] = field(default_factory=dict[str, Upload])
    device: int | None = None
    quarantine: str | None = None

    def replace(self, **changes: Any) -> "Cursor":
        return dataclasses.replace(self, **changes)

    def dump(self) -> str:
        return _CURSOR.dump_json(self, exclude_none=True).decode()


_CURSOR = TypeAdapter(Cursor)


def load_cursor(text: str | None) -> Cursor:
    """Return the cursor of the last tick; a new one if there was none, or if it cannot be read."""
    try:
        return _CURSOR.validate_json(text or "{}")
    except ValidationError:
        return Cursor()
