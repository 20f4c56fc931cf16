"""The fixture ``site``."""

from qwen_pipeline_tests.site import site

__all__ = ["site"]
