"""Where settings are read from: one file, and the environment."""

import os
from pathlib import Path

PREFIX = "QWEN_PIPELINE_"
FILE_VARIABLE = PREFIX + "CONFIG"
DEFAULT_FILE = "qwen_pipeline.toml"
INTERNAL = {FILE_VARIABLE, PREFIX + "MESSAGES_FD", PREFIX + "PARENT"}


def config_file() -> Path:
    """The settings file, whether or not it is there."""
    return Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE)).expanduser().absolute()


def beside_config(path: Path) -> Path:
    return config_file().parent / path.expanduser()
