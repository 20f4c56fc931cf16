"""Object storage as a target: ``<url>/<product>/<digest>/``, and an object ``production.json`` beside it."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.config.storage import ReleaseTarget
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, listed
from qwen_pipeline.lineage.verification.intact import files_below
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.releases.targets.deliver import Delivery

DIGITS = 16
POINTER = "production.json"
_CHUNK = 8 * 2**20


def deliver_objects(target: ReleaseTarget, product: str, release: Path, *, observe: Observe) -> Delivery:
    """Upload the files of a release that are not there, the manifest last, and read all of them back.

    Raises:
        CheckFailed: What is there is not the release.
        EnvironmentFault: The library is missing, or the storage cannot be reached or refuses.
    """
    assert target.url is not None, "the settings require a URL"
    digest = read_record(release).step.content_digest
    place = f"{product}/{digest.removeprefix('sha256:')[:DIGITS]}"
    files = {**files_below(release, attestations=True), MANIFEST: release / MANIFEST}
    bucket = _Bucket(target.url, target.endpoint)
    there = bucket.names(place)
    missing = [path for path in files if path not in there]
    total, done = sum(files[path].stat().st_size for path in missing), 0
    for path in missing:
        bucket.put(f"{place}/{path}", files[path])
        done += files[path].stat().st_size
        observe(Progress(task="deliver", done=done, total=total, unit="bytes"))
    wrong = [f"{path} is not part of it" for path in sorted(there - files.keys())]
    wrong += [
        f"{path} has other bytes" for path, file in files.items() if bucket.sha256(f"{place}/{path}") != _of(file)
    ]
    if wrong:
        raise CheckFailed(
            f"{target.url}/{place} is not the release: {listed(wrong)}.",
            remedy="Delete these objects, unless a server reads them, and promote again.",
        )
    pointer = json.dumps({"release": place, "content_digest": digest}).encode()
    return Delivery(
        kind=target.kind,
        place=f"{target.url.rstrip('/')}/{place}",
        files=missing,
        nbytes=total,
        lead=lambda: bucket.put(f"{product}/{POINTER}", pointer),
    )


class _Bucket:
    """Objects below a URL, through obstore. Credentials are those of the environment (``AWS_ACCESS_KEY_ID``...).

    An upload that fails leaves no object.
    """

    def __init__(self, url: str, endpoint: str | None) -> None:
        try:
            self._obstore: Any = import_module("obstore")
        except ImportError as error:
            raise EnvironmentFault(
                f"The target {url} needs obstore: {error}.", remedy="pip install 'qwen-pipeline[objects]'"
            ) from error
        options: Mapping[str, Any] = {"endpoint": endpoint} if endpoint else {}
        if endpoint and endpoint.startswith("http:"):
            options = {**options, "client_options": {"allow_http": True}}
        self._url = url
        with self._faults("opened"):
            self._store: Any = self._obstore.store.from_url(url, **options)

    def names(self, place: str) -> set[str]:
        """Return the names of the objects below a place, relative to it."""
        with self._faults("listed"):
            found = [entry["path"] for chunk in self._obstore.list(self._store, place) for entry in chunk]
        return {path.removeprefix(f"{place}/") for path in found}

    def put(self, path: str, content: Path | bytes) -> None:
        with self._faults(f"written ({path})"):
            self._obstore.put(self._store, path, content)

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of an object's bytes, which are read as a stream."""
        digest = hashlib.sha256()
        with self._faults(f"read ({path})"):
            for chunk in self._obstore.get(self._store, path).stream(min_chunk_size=_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _faults(self, verb: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # the library raises errors of its own, of the system, and of its config
            raise EnvironmentFault(
                f"{self._url} cannot be {verb}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
                remedy="Check the URL, the endpoint and the credentials in the environment, and promote again; what is "
                "delivered stays.",
            ) from error


def _of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
