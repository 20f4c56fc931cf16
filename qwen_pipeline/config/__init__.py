"""The settings of the pipeline: one typed model, read from one TOML file and the environment.

The file is ``qwen_pipeline.toml`` in the working directory, or the file that ``QWEN_PIPELINE_CONFIG`` names. A variable
``QWEN_PIPELINE_<FIELD>``, with ``__`` between a section and its field, takes precedence over the file. Relative paths
are resolved against the directory of the file, so that settings do not depend on the working directory.
"""

from qwen_pipeline.config.file import DEFAULT_FILE, FILE_VARIABLE, PREFIX, config_file
from qwen_pipeline.config.loading import load_settings, require_setting, settings_from_values, settings_of
from qwen_pipeline.config.settings import Settings

__all__ = [
    "DEFAULT_FILE",
    "FILE_VARIABLE",
    "PREFIX",
    "Settings",
    "config_file",
    "load_settings",
    "require_setting",
    "settings_from_values",
    "settings_of",
]
