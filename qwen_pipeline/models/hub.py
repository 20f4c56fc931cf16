"""Where the bytes of a base model are: a directory as it is, or a snapshot of a hub's repository."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.errors import CheckpointRefused, EnvironmentFault, InputRefused

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What a checkpoint consists of here. Pickled weights and code are never fetched."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_base(name: str, *, revision: str | None = None, beside: Path = Path()) -> Path:
    """Return the directory of a base model, fetching it from the hub unless it is in the hub's cache already.

    Args:
        name: A directory, or a hub id such as ``Qwen/Qwen2.5-72B-Instruct``.
        revision: Commit, tag or branch of a hub repository. Only a commit names the same bytes tomorrow.
        beside: Where relative directories start.

    Raises:
        InputRefused: Neither a directory nor a hub id, or the hub has no such repository or revision for us.
        EnvironmentFault: The hub cannot be reached and its cache does not hold the snapshot.
    """
    directory = beside / Path(name).expanduser()
    if directory.is_dir():
        return directory
    _require_hub_id(name, directory)
    return _snapshot(name, revision, WANTED)


def load_config(name: str, *, revision: str | None = None, beside: Path = Path()) -> dict[str, Any]:
    """Return a model's config, fetching ``config.json`` alone if ``name`` is a hub id.

    Args:
        name: A directory, a file or a hub id.
        revision: Commit, tag or branch of a hub repository.
        beside: Where relative paths start.

    Raises:
        InputRefused: Neither a directory, a file nor a hub id, or the hub has no such repository for us.
        CheckpointRefused: The file is not there, or not JSON.
        EnvironmentFault: The hub cannot be reached and its cache does not hold the file.
    """
    path = beside / Path(name).expanduser()
    if not path.exists():
        _require_hub_id(name, path)
        path = _snapshot(name, revision, (CONFIG,))
    file = path if path.is_file() else path / CONFIG
    return load_json(file)


def _require_hub_id(name: str, directory: Path) -> None:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointRefused(
            f"The base {name!r} is neither a directory ({directory}) nor a hub id.",
            remedy="Name a directory with safetensors weights, or an id such as Qwen/Qwen2.5-72B-Instruct.",
        )


def _snapshot(repository: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repository} at revision {revision or 'main'}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
    except GatedRepoError as error:
        raise InputRefused(
            f"The hub gives {what} only to those who accepted its terms.",
            remedy=f"Accept them at https://huggingface.co/{repository} and set HF_TOKEN.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputRefused(
            f"The hub has no {what} that this account may read.",
            remedy="Check base_model and base_revision; for a private repository set HF_TOKEN.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"{what} is not in the hub's cache and cannot be fetched: {error}",
            remedy="Connect to the hub, or set base_model to a directory that holds the model.",
        ) from error
