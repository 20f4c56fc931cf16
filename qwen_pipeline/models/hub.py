"""The directory of a base model: a local one, or a snapshot of a repository on the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.config_types import load_config_file
from qwen_pipeline.checkpoint.files import with_home
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.errors import CheckpointRefused, EnvironmentFault, InputRefused

FILE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""The files of a checkpoint that are downloaded. Pickled weights and code never are."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_base(name: str, *, revision: str | None = None, relative_to: Path = Path()) -> Path:
    """Return the directory of a base model, downloading it from the hub unless it is in the local hub cache.

    Args:
        name: A directory, or a hub id such as ``Qwen/Qwen2.5-72B-Instruct``.
        revision: Commit, tag or branch of a hub repository. Only a commit always refers to the same bytes.
        relative_to: The directory that relative paths are resolved against.

    Raises:
        InputRefused: The name is neither a directory nor a hub id, or this account may not read the repository or
            revision, or it does not exist.
        EnvironmentFault: The hub cannot be reached and its cache does not hold the snapshot.
    """
    directory = relative_to / with_home(Path(name))
    if directory.is_dir():
        return directory
    _require_hub_id(name, directory)
    return _snapshot(name, revision, FILE_PATTERNS)


def cached_base(name: str, *, revision: str | None = None, relative_to: Path = Path()) -> Path:
    """Return the directory of a base that is on this machine: a local one, or its snapshot in the hub's cache.

    Nothing is downloaded. What is in neither place is returned as a local directory, which does not exist.
    """
    if (directory := relative_to / with_home(Path(name))).is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG, revision=revision) if name.count("/") == 1 else None
    return Path(found).parent if isinstance(found, str) else directory


def load_config(name: str, *, revision: str | None = None, relative_to: Path = Path()) -> dict[str, Any]:
    """Return a model's config, downloading only ``config.json`` if ``name`` is a hub id.

    Args:
        name: A directory, a file or a hub id.
        revision: Commit, tag or branch of a hub repository.
        relative_to: The directory that relative paths are resolved against.

    Raises:
        InputRefused: The name is neither a directory, a file nor a hub id, or this account may not read the repository
            or revision, or it does not exist.
        CheckpointRefused: The file is missing, is not JSON, or has values of wrong types.
        EnvironmentFault: The hub cannot be reached and its cache does not hold the file.
    """
    path = relative_to / with_home(Path(name))
    if not path.exists():
        _require_hub_id(name, path)
        path = _snapshot(name, revision, (CONFIG,))
    file = path if path.is_file() else path / CONFIG
    return load_config_file(file)


def cached_config(name: str, *, revision: str | None = None, relative_to: Path = Path()) -> dict[str, Any] | None:
    """Return a model's config if it is on this machine, in a directory or in the hub's cache; nothing is downloaded.

    Raises:
        CheckpointRefused: The file is not JSON, or has values of wrong types.
    """
    from huggingface_hub import try_to_load_from_cache

    file = relative_to / with_home(Path(name)) / CONFIG
    if not file.is_file():
        cached = try_to_load_from_cache(name, CONFIG, revision=revision) if _HUB_ID.fullmatch(name) else None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return load_config_file(file)


def _require_hub_id(name: str, directory: Path) -> None:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointRefused(
            f"The base {name!r} is neither a directory ({directory}) nor a hub id.",
            remedy="Use a directory with safetensors weights, or an id such as Qwen/Qwen2.5-72B-Instruct.",
        )


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    snapshot = f"{repository} at revision {revision or 'main'}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise InputRefused(
            f"{snapshot} is gated: the hub requires that you accept its terms.",
            remedy=f"Accept them at https://huggingface.co/{repository} and set HF_TOKEN.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputRefused(
            f"The hub has no {snapshot}, or this account may not read it.",
            remedy="Check base_model and base_revision; for a private repository set HF_TOKEN.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"{snapshot} is not in the hub's cache and cannot be downloaded: {error}",
            remedy="Connect to the hub, or set base_model to a directory that holds the model.",
        ) from error
