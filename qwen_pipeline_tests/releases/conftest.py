"""A workspace for releases."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.releases.released import Released


@pytest.fixture
def released(chain: Chain, validated: Artifact, tmp_path: Path) -> Released:
    return Released(tmp_path / "workspace", chain, validated.path)
