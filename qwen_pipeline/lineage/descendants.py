"""Descendants of a digest in a store: who used this adapter, which releases come from this base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.lineage.library import Library, recorded_steps
from qwen_pipeline.lineage.verification.order import makers_of
from qwen_pipeline.lineage.verification.records import RecordedStep, read_record

MIN_DIGITS = 6
Makers = Mapping[str, Sequence[RecordedStep]]
"""Content digest -> the steps that made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descendant:
    """An output that was made from a digest, directly or by further stages.

    Attributes:
        through: Role of the input through which it descends.
        parent: The content digest of that input.
        path: Its directory; None if only a later stage records it.
        name: The fine-tune, as the store's directory names it.
    """

    stage: str
    digest: str
    through: str
    parent: str
    path: Path | None
    name: str

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "fine_tune": self.name,
            "digest": self.digest,
            "through": self.through,
            "parent": self.parent,
            "path": str(self.path) if self.path else None,
        }


def resolve(text: str, library: Library) -> str:
    """Return the digest that a few of its first digits, or a finished directory, stand for.

    Raises:
        InputRefused: No output in the library is, was made from or records such a digest, or several do.
    """
    if (Path(text) / "manifest.json").is_file():
        return read_record(Path(text)).step.content_digest
    digits = text.removeprefix("sha256:")
    known = {digest for step in _steps(library).values() for digest in (step.content_digest, *step.inputs.values())}
    found = sorted(digest for digest in known if digest.removeprefix("sha256:").startswith(digits))
    if len(digits) >= MIN_DIGITS and len(found) == 1:
        return found[0]
    if len(digits) >= MIN_DIGITS and found:
        raise InputRefused(f"{text} is the beginning of {len(found)} digests.", remedy="Give more of its digits.")
    raise InputRefused(
        f"No output or input that the {len(library.places)} outputs found here record has the digest {text}.",
        remedy=f"Give {MIN_DIGITS} or more of its first digits, or a directory; name further places with --in.",
    )


def descendants(digest: str, library: Library) -> list[Descendant]:
    """Return everything that was made from a digest, in the order of the stages."""
    steps, found = _steps(library), list[Descendant]()
    makers: dict[str, list[RecordedStep]] = {}
    for step in steps.values():
        makers.setdefault(step.content_digest, []).append(step)
    frontier, seen = {digest: makers.get(digest, [])}, set[str]()
    while frontier:
        made = {
            step.key: (step, role, parent)
            for step in steps.values()
            for role, parent in step.made_from.items()
            if step.key not in seen and step.content_digest != digest and _used(parent, step, frontier, makers, digest)
        }
        frontier = {}
        for step, role, parent in made.values():
            found += [_descendant(step, role, parent, place) for place in _places(step, library)]
            frontier.setdefault(step.content_digest, []).append(step)
        seen |= made.keys()
    return found


def _used(parent: str, step: RecordedStep, frontier: Makers, makers: Makers, origin: str) -> bool:
    """Return whether a step used an input that one of the steps of the frontier made, or the origin itself."""
    if parent == origin or parent not in frontier:
        return parent in frontier
    return any(maker in frontier[parent] for maker in makers_of(parent, step, makers[parent]))


def _steps(library: Library) -> Mapping[tuple[str, str], RecordedStep]:
    steps: dict[tuple[str, str], RecordedStep] = {}
    for root in library.directories():
        try:
            own = read_record(root).step
        except CheckpointRefused:
            continue
        for step in [*recorded_steps(root), own]:
            steps[step.content_digest, step.key] = step
    return steps


def _places(step: RecordedStep, library: Library) -> list[Path | None]:
    """Return the directories that this very step made; another may have made the same bytes of other inputs."""
    stated = library.places.get(step.content_digest, [])
    return [place for place in stated if read_record(place).step.key == step.key] or [None]


def _descendant(step: RecordedStep, role: str, parent: str, place: Path | None) -> Descendant:
    name = place.parent.name if place else str(step.spec.get("fine_tune", ""))
    return Descendant(stage=step.stage, digest=step.content_digest, through=role, parent=parent, path=place, name=name)
