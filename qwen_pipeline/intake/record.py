"""The record of all placements, ``<workspace>/intake.json``, which the sensor, the status and the UI share.

That of imports is ``<workspace>/imports.json``.

An upload is judged once: again only if its files change, or the settings that placements depend on. So a tick over a
thousand known uploads reads none of them.
"""

import time
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.checkpoint.files import write_bytes
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.intake.bases import known_bases
from qwen_pipeline.intake.placement import Inflow, Placement, place, place_import, rules_digest
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.models.open import fine_tune_digest

RECORDS: Mapping[Inflow, str] = {"fine_tunes": "intake.json", "imports": "imports.json"}
IMPORTS_PREFIX = "imports/"
"""Prefix of a quarantined import's name in a list with fine-tunes."""
INCOMPLETE_SECONDS = 600
"""Seconds without a change after which an incomplete upload counts as quarantined: it will not complete itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An upload that was judged.

    Attributes:
        fingerprint: Its files at that time.
        rules: Digest of the settings that placements depended on at that time.
        placement: The judgement.
        since: Unix time since when it has been so, with the same reason.
        digest: Its content digest, once it was needed.
    """

    fingerprint: str
    rules: str
    placement: Placement
    since: float
    digest: str | None = None

    @property
    def is_quarantined(self) -> bool:
        """True if it needs a person: it cannot be taken, or has stayed incomplete."""
        waiting = self.placement.state == "incomplete" and time.time() - self.since > INCOMPLETE_SECONDS
        return waiting or self.placement.state == "quarantined"


_RECORD = TypeAdapter(dict[str, Judged])


@dataclass(slots=True)
class Intake:
    """The judgements on uploads.

    Attributes:
        settings: The settings.
        rules: The digest of those that placements depend on.
        of: The kind of the uploads.
        judged: Name -> judgement.
        is_changed: Whether a judgement has been added or removed since it was opened.
        bases: The bases of the settings, once they are needed.
    """

    settings: Settings
    rules: str
    of: Inflow = "fine_tunes"
    judged: dict[str, Judged] = field(default_factory=dict[str, Judged])
    is_changed: bool = False
    bases: Mapping[str, KnownBase] | None = None

    @property
    def quarantined(self) -> dict[str, Judged]:
        """Name -> judgement of each upload that needs a person, sorted."""
        return _quarantined(self.judged)

    def is_known(self, arrival: Arrival) -> bool:
        """Return whether the upload was judged as it is now."""
        found = self.judged.get(arrival.name)
        if found is None or not found.placement.is_final:
            return False
        return (found.fingerprint, found.rules) == (arrival.fingerprint, self.rules)

    def judge(self, arrival: Arrival) -> Judged:
        """Return the judgement on an upload; it is made now unless it is known.

        Raises:
            OSError: A file vanished meanwhile.
        """
        before = self.judged.get(arrival.name)
        if before and self.is_known(arrival):
            return before
        placement = self._place(arrival)
        is_same = before and before.fingerprint == arrival.fingerprint and before.placement == placement
        found = Judged(
            fingerprint=arrival.fingerprint,
            rules=self.rules,
            placement=placement,
            since=before.since if before and is_same else time.time(),
            digest=before.digest if before and before.fingerprint == arrival.fingerprint else None,
        )
        self.judged[arrival.name], self.is_changed = found, True
        return found

    def _place(self, arrival: Arrival) -> Placement:
        if self.of == "imports":
            return place_import(self.settings, arrival)
        with suppress(PipelineError):  # it is the reason of every placement then
            self.bases = self.bases or known_bases(self.settings)
        return place(self.settings, arrival, self.bases)

    def digest(self, arrival: Arrival) -> str:
        """Return the content digest of an upload, which is computed once.

        Raises:
            InputRefused: It cannot be opened.
            OSError: A file vanished meanwhile.
        """
        found = self.judge(arrival)
        if found.digest is None:
            found = replace(found, digest=fine_tune_digest(arrival.path))
            self.judged[arrival.name], self.is_changed = found, True
        return str(found.digest)

    def keep(self, names: Collection[str]) -> None:
        """Forget all uploads but these."""
        for name in self.judged.keys() - set(names):
            del self.judged[name]
            self.is_changed = True


@contextmanager
def open_intake(settings: Settings, of: Inflow = "fine_tunes") -> Generator[Intake, None, None]:
    """Yield the judgements of the record, and write those that were added."""
    file = settings.workspace / RECORDS[of]
    intake = Intake(settings=settings, rules=rules_digest(settings, of), of=of, judged=_load(file))
    yield intake
    if intake.is_changed:
        with suppress(OSError):  # it is made again by the next one
            write_bytes(file, _RECORD.dump_json(intake.judged))


def load_quarantine(workspace: Path) -> dict[str, Judged]:
    """Return name -> judgement of each upload that needs a person, as it was last recorded.

    The names of imports begin with ``imports/``.
    """
    return _quarantined(_load(workspace / RECORDS["fine_tunes"])) | quarantined_imports(workspace)


def quarantined_imports(workspace: Path) -> dict[str, Judged]:
    """Return ``imports/<name>`` -> judgement of each import that needs a person, as it was last recorded."""
    found = _quarantined(_load(workspace / RECORDS["imports"]))
    return {f"{IMPORTS_PREFIX}{name}": judged for name, judged in found.items()}


def _quarantined(judged: Mapping[str, Judged]) -> dict[str, Judged]:
    return {name: judged[name] for name in sorted(judged) if judged[name].is_quarantined}


def _load(file: Path) -> dict[str, Judged]:
    try:
        return _RECORD.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return {}
