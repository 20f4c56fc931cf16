"""The chain in a store, with a signed release."""

import pytest

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.lineage.chained import Chained, make_chained


@pytest.fixture(scope="session")
def chained(chain: Chain, validated: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Return the chain that tests read; those that change it copy it first."""
    return make_chained(tmp_path_factory.mktemp("chained"), chain, validated.path)
