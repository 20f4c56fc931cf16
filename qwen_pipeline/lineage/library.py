"""Finished directories by content digest: those of a store, those beside a directory, and inputs from outside."""

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest, rereading
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS, MANIFEST_FILE
from qwen_pipeline.checkpoint.store.destinations import DROPPED, PARTIAL
from qwen_pipeline.errors import CheckpointRefused, PipelineError
from qwen_pipeline.lineage.verification.records import Record, RecordedStep, read_record, read_steps, step_from_json
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.text.sources import open_text

_REPORTS = ("report.json", "validation/report.json")
_MODEL_FILES = ("config.json", "adapter_config.json", "adapters.toml")
_DEPTH, _KEY_LENGTH = 3, 16
"""A store has a directory of a derivation at ``<stage>/<fine-tune>/<key>``."""


@dataclass(frozen=True)
class Library:
    """Directories with a manifest, by the content digest that it states; nothing is verified yet.

    Attributes:
        places: Content digest -> directories that state it.
        unreadable: Directories whose manifest cannot be read -> the reason.
        dropped: Content digest -> kept manifests of directories that retention removed.
    """

    places: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    unreadable: dict[Path, str] = field(default_factory=dict[Path, str])
    dropped: dict[str, list[Path]] = field(default_factory=dict[str, "list[Path]"])

    def find(self, digest: str, *, near: Path, chain: Collection[str] = ()) -> Path | None:
        """Return a directory of a digest; of several, the one that fits a chain best.

        Two steps may give the same bytes: tokens of one text, drawn for two fine-tunes.

        Args:
            digest: The content digest.
            near: A directory of the chain; one of the same fine-tune is preferred.
            chain: Derivation keys and content digests of the chain, which decide before the fine-tune does.
        """
        found = self.places.get(digest, [])

        def fitness(path: Path) -> tuple[bool, int, bool]:
            is_near = path.parent.name == near.parent.name
            try:
                step = read_record(path).step
            except CheckpointRefused:
                return False, -1, is_near
            return step.key in chain, sum(each in chain for each in step.inputs.values()), is_near

        return max(found, key=fitness) if found[1:] else next(iter(found), None)

    def directories(self) -> Iterable[Path]:
        return (path for paths in self.places.values() for path in paths)


def open_library(roots: Iterable[Path]) -> Library:
    """Find every finished directory in, or up to three levels below, some directories."""
    library, roots = Library(), list(roots)
    patterns = ["*/" * depth + MANIFEST_FILE for depth in range(_DEPTH + 1)]
    manifests = {path for root in roots for pattern in patterns for path in root.glob(pattern)}
    for root in sorted({located(path.parent) for path in manifests}):
        if not root.name.endswith(PARTIAL):
            _add(library, library.places, root)
    kept = {path for root in roots for path in (root / DROPPED).glob(f"*/*/*/{MANIFEST_FILE}")}
    for root in sorted(located(path.parent) for path in kept):
        if not (root.parents[_DEPTH] / Path(*root.parts[-_DEPTH:])).exists():
            _add(library, library.dropped, root)
    return library


def _add(library: Library, places: dict[str, list[Path]], root: Path) -> None:
    try:
        stated = load_json(root / MANIFEST_FILE)["content_digest"]
    except CheckpointRefused as refused:
        library.unreadable[root] = refused.what
    except KeyError:
        library.unreadable[root] = f"{root / MANIFEST_FILE} states no content digest."
    else:
        places.setdefault(str(stated), []).append(root)


def located(root: Path) -> Path:
    """Return a directory by the name that its store gives it: ``latest`` and pointers are followed.

    A derivation whose directory was replaced by a link keeps its name, so that the store's log is asked about it.
    """
    at = root.parent.resolve() / root.name
    while at.is_symlink() and not _is_key(at.name):
        link = at.parent / at.readlink()
        at = link.parent.resolve() / link.name
    return at if _is_key(at.name) else at.resolve()


def _is_key(name: str) -> bool:
    return len(name) == _KEY_LENGTH and not name.strip("0123456789abcdef")


def store_of(root: Path) -> Path | None:
    """Return the store that a directory lies in, ``<store>/<stage>/<fine-tune>/<key>``; None if it is elsewhere."""
    resolved = located(root)
    try:
        stage = load_json(resolved / MANIFEST_FILE)["derivation"]["stage"]
    except (CheckpointRefused, KeyError, TypeError):
        return None
    return resolved.parents[_DEPTH - 1] if resolved.parent.parent.name == stage else None


def misplaced(record: Record) -> str:
    """Return how a directory of a store differs from what a stage left there, in its name or by a link; else empty.

    A directory elsewhere, such as a cache of the hub, may have links: its files count as what they lead to.
    """
    root, key = record.root, record.step.key
    if not _is_key(root.name) or root.parent.parent.name != record.step.stage:
        return ""
    if not key.startswith(root.name):
        return (
            f"its manifest's stage, inputs, settings and code version have the key {key}, its directory is {root.name}"
        )
    links = [path for path in (*sorted(record.files), MANIFEST_FILE, *ATTESTATIONS) if (root / path).is_symlink()]
    return f"{links[0]} is a link to {(root / links[0]).readlink()}, so its bytes are not in the store" if links else ""


def recorded_steps(root: Path) -> list[RecordedStep]:
    """Return the steps that a release or a validation records besides its own; none if it is another output."""
    steps: list[RecordedStep] = []
    with suppress(CheckpointRefused):  # it is not a release
        steps += read_steps(root)
    for name in _REPORTS:
        with suppress(CheckpointRefused, KeyError, TypeError, ValueError, AttributeError):  # it is not a validation
            steps += map(step_from_json, load_json(root / name).get("lineage", ()))
    return steps


@dataclass
class Sources:
    """Inputs that no stage made: models, adapters and texts, whose digests are computed when they are asked for.

    Attributes:
        paths: Directories and files that may be inputs.
        remembered: Whether the digest of a file that did not change since it was hashed may be taken from the cache.
    """

    paths: list[Path]
    remembered: bool = False
    _digests: dict[tuple[Path, str], str | None] = field(default_factory=dict[tuple[Path, str], "str | None"])

    def add(self, *paths: Path) -> None:
        self.paths += [path for path in paths if path not in self.paths]

    def find(self, role: str, digest: str) -> Path | None:
        """Return the input whose bytes give a digest; every byte of the ones that are tried is read, once.

        Of a directory with a manifest, the digest is the stated one, which the caller compares with its bytes.
        """
        return next((path for path in self.paths if self._digest(path, role) == digest), None)

    def _digest(self, path: Path, role: str) -> str | None:
        key = (path, _KINDS.get(role, "fine_tune"))
        if key not in self._digests:
            try:
                with nullcontext() if self.remembered else rereading():
                    self._digests[key] = _DIGESTS[key[1]](path)
            except (PipelineError, OSError):
                self._digests[key] = None  # it is an input of another kind
        return self._digests[key]


def _text_digest(path: Path) -> str:
    if any((path / name).is_file() for name in _MODEL_FILES):
        raise CheckpointRefused(f"{path} is a model.", remedy="Pass a text.")
    return open_text(path).digest()


_KINDS = {"base": "model", "reference": "model", "source": "model", "text": "text", "calibration": "text"}
_DIGESTS: dict[str, Callable[[Path], str]] = {
    "model": checkpoint_digest,
    "fine_tune": fine_tune_digest,
    "text": _text_digest,
}
