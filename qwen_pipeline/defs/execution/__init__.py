"""The place where steps run: the needs of each, and the executors that meet them."""
