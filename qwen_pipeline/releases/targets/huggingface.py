"""A repository of Hugging Face as a target: a branch for each release, and ``main`` for the one in production."""

import hashlib
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.config.storage import ReleaseTarget
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, listed
from qwen_pipeline.lineage.verification.intact import files_below
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.progress import Observe
from qwen_pipeline.releases.targets.deliver import Delivery

MAIN, DIGITS = "main", 16
_ADDED_BY_THE_HUB = frozenset({".gitattributes"})


def deliver_huggingface(target: ReleaseTarget, product: str, release: Path, *, observe: Observe) -> Delivery:  # noqa: ARG001
    """Upload a release to a branch named by its digest, unless it is there, and compare every digest that the hub has.

    Raises:
        CheckFailed: What the hub has is not the release.
        EnvironmentFault: The hub cannot be reached, or refuses the token.
    """
    assert target.repository is not None, "the settings require a repository"
    repository = target.repository.replace("{product}", product.replace("@", "-"))
    branch = f"release-{read_record(release).step.content_digest.removeprefix('sha256:')[:DIGITS]}"
    files = {**files_below(release, attestations=True), MANIFEST: release / MANIFEST}
    nbytes = sum(file.stat().st_size for file in files.values())
    if target.dry_run:
        place = f"{repository}@{branch}"
        return Delivery(
            kind=target.kind, place=place, files=sorted(files), nbytes=nbytes, dry_run=True, lead=lambda: None
        )
    repo = _Repository(repository, release, files)
    repo.create(private=target.private)
    sent = repo.send(branch)
    return Delivery(
        kind=target.kind,
        place=f"{repository}@{branch}",
        files=sorted(files) if sent else [],
        nbytes=nbytes if sent else 0,
        lead=lambda: repo.send(MAIN),
    )


class _Repository:
    """A repository, through :class:`huggingface_hub.HfApi` with the token of the environment."""

    def __init__(self, name: str, release: Path, files: dict[str, Path]) -> None:
        from huggingface_hub import HfApi

        self._api: Any = HfApi()
        self._name, self._release, self._files = name, release, files

    def create(self, *, private: bool) -> None:
        self._call("create_repo", private=private, exist_ok=True)

    def send(self, branch: str) -> bool:
        """Upload the release to a branch, unless it is there; return whether anything was sent."""
        if branch != MAIN:
            self._call("create_branch", branch=branch, exist_ok=True)
        if not self._differences(branch):
            return False
        self._call(
            "upload_folder",
            folder_path=self._release,
            revision=branch,
            delete_patterns="*",
            commit_message=f"Release {self._release.name}",
        )
        if wrong := self._differences(branch):
            raise CheckFailed(
                f"{self._name}@{branch} is not the release: {listed(wrong)}.",
                remedy="Delete it, and promote again.",
            )
        return True

    def _differences(self, branch: str) -> list[str]:
        tree = self._call("list_repo_tree", revision=branch, recursive=True)
        there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        extra = sorted(there.keys() - self._files.keys() - _ADDED_BY_THE_HUB)
        return [
            *(f"{path} is missing" for path in sorted(self._files.keys() - there.keys())),
            *(f"{path} is not part of it" for path in extra),
            *(
                f"{path} has other bytes"
                for path in sorted(self._files.keys() & there.keys())
                if not _is_same(self._files[path], there[path])
            ),
        ]

    def _call(self, method: str, **arguments: Any) -> Any:
        try:
            found = getattr(self._api, method)(repo_id=self._name, **arguments)
            return list(found) if method == "list_repo_tree" else found
        except Exception as error:  # the library raises errors of its own, and those of its HTTP client
            raise EnvironmentFault(
                f"{method} of {self._name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}.",
                remedy="Check HF_TOKEN, HF_ENDPOINT and the name of the repository, and promote again.",
            ) from error


def _is_same(file: Path, entry: Any) -> bool:
    """Compare a file with the SHA-256 that the hub has of a large file, or Git's SHA-1 of a small one."""
    if entry.lfs:
        with file.open("rb") as opened:
            return entry.lfs.sha256 == hashlib.file_digest(opened, "sha256").hexdigest()
    data = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
