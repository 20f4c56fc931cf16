"""The location of the settings file and the names of environment variables."""

import os
from pathlib import Path

PREFIX = "QWEN_PIPELINE_"
FILE_VARIABLE = PREFIX + "CONFIG"
DEFAULT_FILE = "qwen_pipeline.toml"
INTERNAL = {FILE_VARIABLE, PREFIX + "MESSAGES_FD", PREFIX + "PARENT"}


def config_file() -> Path:
    """Return the absolute path of the settings file, which may not exist."""
    return Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE)).expanduser().absolute()


def beside_config(path: Path) -> Path:
    """Resolve a relative path against the directory of the settings file."""
    return config_file().parent / path.expanduser()
