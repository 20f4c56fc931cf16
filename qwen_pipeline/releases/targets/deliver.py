"""Delivery of a release to every target of the settings: first its bytes, and after the promotion the pointers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.config.storage import ReleaseTarget
from qwen_pipeline.progress import Observe, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A release at a target.

    Attributes:
        kind: Kind of the target.
        place: The directory, or the repository and its revision.
        files: Files that were written; in a dry run, those that would be.
        nbytes: Their bytes.
        pointed: Whether the target's pointer leads to the release.
        dry_run: Whether nothing was sent.
    """

    kind: str
    place: str
    files: Sequence[str]
    nbytes: int
    pointed: bool = False
    dry_run: bool = False
    lead: Callable[[], object] = field(repr=False)

    def point(self) -> "Delivery":
        """Point the target's pointer at the release."""
        self.lead()
        return replace(self, pointed=not self.dry_run)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "place": self.place,
            "files": list(self.files),
            "bytes": self.nbytes,
            "pointed": self.pointed,
            "dry_run": self.dry_run,
        }


def deliver(
    targets: Sequence[ReleaseTarget], product: str, release: Path, *, observe: Observe = unobserved
) -> list[Delivery]:
    """Bring a release to every target, and read it back there; the pointers of the targets stay where they are.

    Raises:
        CheckFailed: What is at a target is not the release.
        EnvironmentFault: A target cannot be reached or written.
    """
    from qwen_pipeline.releases.targets.directory import deliver_directory
    from qwen_pipeline.releases.targets.huggingface import deliver_huggingface
    from qwen_pipeline.releases.targets.objects import deliver_objects

    kinds = {"directory": deliver_directory, "huggingface": deliver_huggingface, "objects": deliver_objects}
    return [kinds[target.kind](target, product, release, observe=observe) for target in targets]
