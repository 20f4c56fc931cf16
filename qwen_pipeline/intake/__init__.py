"""The intake of uploads: the base and the recipes of each fine-tune, and the reason why one cannot be taken."""
