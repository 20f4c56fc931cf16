"""SIGKILL at any moment: the next run ends with the same digest, and no reader ever sees half a checkpoint."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint import digest, writer
from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

GEOMETRY = PaddingSpec(group_size=32, tensor_parallel=2)
FLOATS = QuantSpec(method="fp8-dynamic")
KILLS = int(os.environ.get("KILLS", "25"))
SEED = 20
CALLS = ("pwrite", "pwritev", "fsync", "rename", "replace")


@dataclass(frozen=True, slots=True)
class Work:
    """A function that writes directories below its argument."""

    name: str
    do: Callable[[Path], object]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> list[Work]:
    root = tmp_path_factory.mktemp("inputs")
    base = tiny_qwen2(root / "base", shards=4)
    adapter = tiny_adapter(base, root / "adapter")
    return [
        Work("merge", lambda out: merge(base=base, fine_tune=adapter, destination=out / "merged")),
        Work("pad", lambda out: pad(source=base, destination=out / "padded", spec=GEOMETRY)),
        Work(
            "one pass",
            lambda out: merge_pad(
                base=base,
                fine_tune=adapter,
                merged=out / "merged",
                padded=out / "padded",
                spec=GEOMETRY,
            ),
        ),
        Work("floats", lambda out: quantize(source=base, destination=out / "quantized", spec=FLOATS)),
    ]


def digests(out: Path) -> dict[str, str]:
    return {path.parent.name: open_manifest(path.parent).content_digest for path in sorted(out.glob(f"*/{MANIFEST}"))}


def require_complete(out: Path) -> None:
    """Assert that every directory with its final name is complete, as a reader sees it."""
    for root in (out / "merged", out / "padded", out / "quantized"):
        if root.exists():
            manifest = open_manifest(root)
            assert all((root / path).stat().st_size == file.bytes for path, file in manifest.contents.files.items())


def killed(work: Work, out: Path, moment: random.Random, *, calls: int, seconds: float) -> int:
    """Do the work in a forked process that is killed at its n-th write or after some time; return its exit code."""
    at_call = moment.randrange(1, calls) if moment.random() < 0.5 else None
    if (child := os.fork()) == 0:
        if at_call:
            die_at(at_call)
        work.do(out)
        os._exit(0)
    deadline = time.monotonic() + (60 if at_call else moment.uniform(0, seconds))
    while True:
        require_complete(out)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.001)


def die_at(number: int) -> None:
    """Have this process kill itself before its n-th call that changes the disk (of :data:`CALLS`)."""
    left = iter(range(1, number))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def calls_of(work: Work, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Do the work without a kill; return the number of calls that changed the disk, and the seconds."""
    count = 0

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counting(getattr(os, name)))
        began = time.monotonic()
        work.do(out)
    return count, time.monotonic() - began


@pytest.mark.slow
def test_kills_at_any_moment_do_not_change_the_result(
    works: list[Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "BLOCK_BYTES", 4096)
    moment = random.Random(SEED)
    monkeypatch.setattr(writer, "exceeds_page_cache", lambda _: moment.random() < 0.5)
    deaths, attempts = 0, 0
    measured: dict[str, tuple[int, float, dict[str, str]]] = {}
    for work in works:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache of {work.name}"))
        undisturbed = tmp_path / f"undisturbed {work.name}"
        undisturbed.mkdir()
        calls, seconds = calls_of(work, undisturbed, monkeypatch)
        measured[work.name] = calls, seconds, digests(undisturbed)
    while deaths < KILLS:
        attempts += 1
        work = works[attempts % len(works)]
        calls, seconds, expected = measured[work.name]
        out = tmp_path / f"{attempts}"
        out.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {attempts}"))
        for _ in range(moment.randrange(1, 4)):
            code = killed(work, out, moment, calls=calls, seconds=seconds)
            assert code in (0, -signal.SIGKILL), f"attempt {attempts} of {work.name} ended with exit code {code}"
            deaths += code != 0
        work.do(out)
        assert digests(out) == expected, f"attempt {attempts} of {work.name}"
        for root in out.iterdir():
            if root.is_dir():
                require_intact(root)
                assert not root.name.endswith(".partial")
                assert not list(root.glob("*.tmp")) + list(root.glob("*.new")), f"attempt {attempts}"
