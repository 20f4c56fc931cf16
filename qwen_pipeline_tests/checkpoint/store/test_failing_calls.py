"""A call of the operating system that fails, whichever it is, ends in an error that helps; the next run completes.

``faults/`` does the same to whole stages, at calls that Python does not see.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import PipelineError
from qwen_pipeline_tests.checkpoint.copies import copy

pytestmark = pytest.mark.lengthy

CALLS = ("pwrite", "fsync", "rename", "replace", "ftruncate", "mkdir")


def failing_at(number: int, code: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Make the n-th call that changes the disk fail; return whether it was reached."""
    left, struck = iter(range(number)), list[str]()

    def failing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None and not struck:
                struck.append(name)
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return lambda: bool(struck)


@pytest.mark.parametrize(("first", "code"), [*enumerate((errno.ENOSPC, errno.EIO, errno.EROFS))])
def test_whichever_call_fails_the_next_run_completes(first: int, code: int, sharded: Path, tmp_path: Path) -> None:
    expected = copy(sharded, tmp_path / "undisturbed").manifest.content_digest
    tried = 0
    for number in range(first, 100, 3):  # the three tests try every call between them
        out = tmp_path / "out"
        with pytest.MonkeyPatch.context() as patch:
            is_reached = failing_at(number, code, patch)
            try:
                copy(sharded, out)
            except PipelineError as error:
                assert error.exit_code in (2, 3)  # noqa: PT017
                assert str(tmp_path) in error.what  # noqa: PT017
                assert error.remedy  # noqa: PT017
        assert not out.exists() or require_intact(out)
        assert copy(sharded, out).manifest.content_digest == expected
        require_intact(out)
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)
        if not is_reached():
            break
        tried = number
    assert 10 < tried < 90
