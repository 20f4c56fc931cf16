"""Blocks of another size, so that small tensors have several."""

from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

from qwen_pipeline.checkpoint import digest


@contextmanager
def block_bytes(size: int) -> Generator[None, None, None]:
    """Within the body, read and compute tensors in blocks of ``size`` bytes."""
    with patch.object(digest, "BLOCK_BYTES", size):
        yield
