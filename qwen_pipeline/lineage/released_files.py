"""The files that a release may hold: everything else, such as the state of an optimizer, stays here."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, PICKLES, SIDECARS
from qwen_pipeline.checkpoint.trainers.torch_file import open_torch_file
from qwen_pipeline.errors import CheckpointRefused, listed

OF_CHECKPOINT = (CONFIG, INDEX, "quantize_config.json", "*.safetensors", *SIDECARS)
OF_VALIDATION = ("report.md", "report.html", "report.json", "*.png", "*.csv")


def require_releasable(root: Path, paths: Collection[str], allowed: Iterable[str]) -> None:
    """Require that a release may hold the files of a directory.

    Raises:
        CheckpointRefused: A file is not one of those, or a pickle that names anything but tensors and plain values.
    """
    allowed = tuple(allowed)
    if other := [path for path in paths if not any(_matches(path, pattern) for pattern in allowed)]:
        raise CheckpointRefused(
            f"{root} has files that a release may not hold: {listed([ascii(path) for path in other])}.",
            remedy="Make the checkpoint again with this pipeline, from a model without them.",
        )
    for path in paths:
        if any(fnmatchcase(path, pattern) for pattern in PICKLES):
            open_torch_file(root / path)


def _matches(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)
