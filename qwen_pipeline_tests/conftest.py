"""Fixtures that several rooms share, and the markers that fixtures and folders imply."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline_tests.chain import Chain, make_chain, validate_chain

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault of the code
settings.load_profile("untimed")


NEEDING_ENGINE = {"chain", "engine", "imported", "validated"}
"""Fixtures that run a quantizer in its own environment."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``make test-fast`` leaves out: those of a quantizer, and those of the command line."""
    for item in items:
        if NEEDING_ENGINE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)
        if item.path.parent.name == "cli":
            item.add_marker(pytest.mark.lengthy)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """No digest that a test remembers outlives the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def validated(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return validate_chain(chain, tmp_path_factory.mktemp("validated") / "out")
