"""``python -m qwen_pipeline``."""

from qwen_pipeline.cli import main

main()
