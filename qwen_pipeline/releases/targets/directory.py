"""A directory as a target: ``<path>/<product>/<digest>``, and a link ``production`` beside it."""

import shutil
from pathlib import Path

from qwen_pipeline.checkpoint.files import copy_file, open_locked, share_file, sync_directory, sync_tree
from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.store.destinations import PARTIAL
from qwen_pipeline.config.storage import ReleaseTarget
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, EnvironmentFault, listed
from qwen_pipeline.lineage.verification.intact import compare, files_below
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.releases.targets.deliver import Delivery

DIGITS = 16
POINTER = "production"


def deliver_directory(target: ReleaseTarget, product: str, release: Path, *, observe: Observe) -> Delivery:
    """Copy or link a release into a directory, unless it is there, and read it back.

    Raises:
        CheckFailed: What is there is not the release.
        EnvironmentFault: The directory cannot be written.
    """
    assert target.path is not None, "the settings require a path"
    digest = read_record(release).step.content_digest
    folder = target.path / product
    place = folder / digest.removeprefix("sha256:")[:DIGITS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_locked(folder / ".lock", wait=True):
            written = _written(release, place, hard_links=target.hard_links, observe=observe)
            _require_same(place, digest)
    except OSError as error:
        raise EnvironmentFault(
            f"{release.name} of {product} cannot be delivered to {folder}: {error.strerror} ({error.filename}).",
            remedy="Make room there, or make it writable, and promote again; what is delivered stays.",
        ) from error
    return Delivery(
        kind=target.kind,
        place=str(place),
        files=written,
        nbytes=sum((place / path).stat().st_size for path in written),
        lead=lambda: _lead(folder / POINTER, place.name),
    )


def _written(release: Path, place: Path, *, hard_links: bool, observe: Observe) -> list[str]:
    """Write the files that are missing, and return them; a whole release gets its name when it is complete."""
    files = {**files_below(release, attestations=True), MANIFEST: release / MANIFEST}
    out = place if place.is_dir() else place.with_name(place.name + PARTIAL)
    if out != place and out.exists():
        shutil.rmtree(out)
    missing = [path for path in files if not (out / path).exists()]
    total = sum(files[path].stat().st_size for path in missing)
    done = 0
    for path in missing:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        if not (hard_links and share_file(files[path], out / path, hard_links=True)):
            copy_file(files[path], out / path)
        done += files[path].stat().st_size
        observe(Progress(task="deliver", done=done, total=total, unit="bytes"))
    if missing:
        sync_tree(out)
    if out != place:
        out.rename(place)
        sync_directory(place.parent)
    return missing


def _require_same(place: Path, digest: str) -> None:
    try:
        record = read_record(place)
        wrong = [f"{path} {why}" for path, why in sorted(compare(record).items())]
        if record.step.content_digest != digest:
            wrong.append(f"its content digest is {record.step.content_digest}, expected {digest}")
    except CheckpointRefused as refused:
        wrong = [refused.what]
    if wrong:
        raise CheckFailed(
            f"{place} is not the release: {listed(wrong)}.",
            remedy="Delete it, unless a server reads it, and promote again.",
        )


def _lead(link: Path, name: str) -> None:
    scratch = link.with_name(f".{link.name}.new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(name)
    scratch.replace(link)
    sync_directory(link.parent)
