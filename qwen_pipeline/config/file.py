"""The location of the settings file and the names of environment variables."""

import os
from pathlib import Path

from qwen_pipeline.checkpoint.files import with_home

PREFIX = "QWEN_PIPELINE_"
FILE_VARIABLE = PREFIX + "CONFIG"
MAX_PATH, MAX_PART = 1024, 255
DEFAULT_FILE = "qwen_pipeline.toml"
INTERNAL = {FILE_VARIABLE, *(PREFIX + name for name in ("KEY_PASSPHRASE", "MESSAGES_FD", "PARENT"))}
"""Variables that are not settings. That of a passphrase is read by :mod:`qwen_pipeline.lineage.sign`."""


def config_file() -> Path:
    """Return the absolute path of the settings file, which may not exist."""
    return with_home(Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE))).absolute()


def beside_config(path: Path) -> Path:
    """Resolve a relative path against the directory of the settings file.

    Raises:
        ValueError: No file system has such a path.
    """
    text = str(path)
    if len(text) > MAX_PATH or not text.isprintable() or any(len(part.encode()) > MAX_PART for part in path.parts):
        raise ValueError(
            f"expected a path of up to {MAX_PATH} printable characters, with names of up to {MAX_PART} bytes"
        )
    return config_file().parent / with_home(path)
