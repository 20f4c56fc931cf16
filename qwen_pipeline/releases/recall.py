"""Recalls: an adapter, base, text or stage is withdrawn, with everything that was made from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.audits import library_of
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import signing_key
from qwen_pipeline.lineage import statements
from qwen_pipeline.lineage.descendants import Descendant, descendants, resolve
from qwen_pipeline.lineage.pointers import pointed_releases
from qwen_pipeline.lineage.statements import path_of
from qwen_pipeline.releases.promotion import require_reason
from qwen_pipeline.stages import publish


@dataclass(frozen=True, slots=True, kw_only=True)
class Impact:
    """The outputs and releases that descend from a digest.

    Attributes:
        digest: The content digest.
        descendants: Every output that was made from it, in the order of the stages.
        pointers: ``<product>/<pointer>`` -> the release among them that it leads to.
    """

    digest: str
    descendants: Sequence[Descendant]
    pointers: dict[str, str]

    @property
    def releases(self) -> list[Descendant]:
        return [each for each in self.descendants if each.stage == publish.STAGE]

    @property
    def sentence(self) -> str:
        served = ", ".join(sorted(self.pointers)) or "none"
        return (
            f"Outputs that descend from it: {len(self.descendants)}, of them releases: {len(self.releases)}; pointers "
            f"that lead to one: {served}."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "descendants": [each.to_json() for each in self.descendants],
            "pointers": self.pointers,
        }


def impact(settings: Settings, text: str, more: Sequence[Path] | None = None) -> Impact:
    """Return everything that descends from a digest, its first digits, or a finished directory.

    Args:
        settings: The settings.
        text: The digest, digits of it, or a directory.
        more: Further places to search.

    Raises:
        InputRefused: No output records such a digest, or several do.
    """
    library = library_of([Path(text)] if Path(text).is_dir() else [], settings, more)
    digest = resolve(text, library)
    found = descendants(digest, library)
    leading = pointed_releases(settings.store_root)
    made = [path for path in library.places.get(digest, ()) if path.parent.parent.name == publish.STAGE]
    paths = [path_of(path) for path in (*made, *(each.path for each in found)) if path]
    return Impact(
        digest=digest,
        descendants=found,
        pointers={pointer: path for path in paths for pointer in leading.get(path, ())},
    )


def recall(settings: Settings, text: str, *, reason: str, by: str = "", more: Sequence[Path] | None = None) -> Impact:
    """Recall a digest: the recall joins the store's log, signed if there is a key, and counts for all descendants.

    Raises:
        InputRefused: No output records such a digest, or the reason is empty.
    """
    found = impact(settings, text, more)
    settings.store_root.mkdir(parents=True, exist_ok=True)
    key = signing_key(settings)
    statements.recall(settings.store_root, found.digest, reason=require_reason(reason), by=by, key=key)
    return found
