"""Fixtures that several rooms share, and the markers that fixtures and folders imply.

What imports torch is imported when it is used: pytest's own process, which only distributes tests, then starts at once.
"""

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from qwen_pipeline.checkpoint.store.destinations import Artifact
    from qwen_pipeline_tests.chain import Chain

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault of the code
settings.load_profile("untimed")


ROOT = Path(__file__).parent
NEEDING_ENGINE = {"chain", "engine", "imported", "validated"}
"""Fixtures that run a quantizer in its own environment."""

LENGTHY_ROOMS = {"cli", "defs", "layerwise", "retention", "runner", "stages"}
"""Rooms whose tests run whole stages, many steps of a model, or a Dagster instance."""
QUICK_FAMILIES = {"qwen2", "qwen3_5_moe"}
"""A dense model and a mixture of experts, by which ``make test-fast`` judges what is tested with every family."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``make test-fast`` leaves out."""
    from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES

    for item in items:
        if NEEDING_ENGINE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)
        families = set(_parameters(item).split("-")) & set(LANGUAGE_FAMILIES)
        if item.path.relative_to(ROOT).parts[0] in LENGTHY_ROOMS or (families and not families & QUICK_FAMILIES):
            item.add_marker(pytest.mark.lengthy)


def _parameters(item: pytest.Item) -> str:
    return item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """No digest that a test remembers outlives the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_earlier_instance() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Forget the Dagster instance of an earlier test.

    Dagster finds the last instance that was opened through a context variable. A sensor's context that is collected
    late puts back the one before, which may be gone.
    """
    from dagster._core.storage.defs_state.base import set_defs_state_storage

    with set_defs_state_storage(None):
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> "Chain":
    from qwen_pipeline_tests.chain import make_chain

    with _shared_directory(tmp_path_factory) as root:
        return make_chain(root / "chain")


@pytest.fixture(scope="session")
def validated(chain: "Chain", tmp_path_factory: pytest.TempPathFactory) -> "Artifact":
    from qwen_pipeline_tests.chain import validate_chain

    with _shared_directory(tmp_path_factory) as root:
        return validate_chain(chain, root / "validated")


@contextmanager
def _shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """Yield a directory of all processes of the tests: the first one makes what the others wait for and find."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (root / "shared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root
