"""Every setting of the pipeline: one typed model, read from one file and the environment.

The file is ``qwen_pipeline.toml`` in the working directory, or what ``QWEN_PIPELINE_CONFIG`` names. A variable
``QWEN_PIPELINE_<FIELD>``, with ``__`` between a section and its field, wins over the file. Relative paths start at the
directory of the file, so that a pipeline means the same from wherever it is called.
"""

from qwen_pipeline.config.file import DEFAULT_FILE, FILE_VARIABLE, PREFIX, config_file
from qwen_pipeline.config.loading import load_settings, require_setting
from qwen_pipeline.config.settings import Settings

__all__ = ["DEFAULT_FILE", "FILE_VARIABLE", "PREFIX", "Settings", "config_file", "load_settings", "require_setting"]
