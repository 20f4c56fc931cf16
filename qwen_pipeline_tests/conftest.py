import pytest

from qwen_pipeline.checkpoint.store import Artifact
from qwen_pipeline_tests.chain import Chain, make_chain, validate_chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def validated(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return validate_chain(chain, tmp_path_factory.mktemp("validated") / "out")
