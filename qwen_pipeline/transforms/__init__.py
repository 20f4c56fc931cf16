"""Transformations of checkpoints, lazy and independent of directories: LoRA merges, padding, packed codes."""
