"""Tampering with any file of any stage, at random: each change is found and named, and nothing else is."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.trust import Signer
from qwen_pipeline_tests.lineage.chained import Chained
from qwen_pipeline_tests.lineage.tampering import HARMLESS, STAGES, TAMPERINGS, Tampered

FEW, MANY = 24, int(os.environ.get("FUZZ_EXAMPLES", "60"))
"""Changes in ``make test``, and in ``make test-slow`` if the variable does not say otherwise."""


def complaints(chained: Chained, signers: Sequence[Signer] = ()) -> str:
    """Return everything that an audit finds wrong, as one text."""
    try:
        found = chained.audit(signers=signers)
    except CheckpointRefused as refused:
        return refused.what
    absent = [node for node in found.nodes.values() if node.state in ("dropped", "claimed", "attested")]
    return "\n".join([*found.faults, *(f"{node.name} is {node.state}" for node in absent if node.name in STAGES)])


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_change_is_found_and_named(chained: Chained, tmp_path: Path, number: int) -> None:
    @examples(number)
    @given(data=st.data(), change=st.sampled_from(TAMPERINGS))
    def tamper(data: st.DataObject, change: Callable[[Chained, st.DrawFn], Tampered]) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = chained.copy(tmp_path / "copy")
        tampered = change(copy, data.draw)  # pyright: ignore[reportArgumentType]
        found = complaints(copy, tampered.signers)
        assert found, tampered.change
        assert tampered.named in found, tampered.change

    assert not complaints(chained)
    tamper()


@pytest.mark.parametrize("number", [FEW // 4, pytest.param(MANY // 4, marks=pytest.mark.slow)])
def test_nothing_else_is_complained_about(chained: Chained, tmp_path: Path, number: int) -> None:
    """Everyday changes to a sound store, several of them in any order, contradict nothing."""

    @examples(number)
    @given(data=st.data(), changes=st.lists(st.sampled_from(HARMLESS), min_size=1, max_size=4, unique=True))
    def change_harmlessly(data: st.DataObject, changes: list[Callable[[Chained, st.DrawFn], None]]) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = chained.copy(tmp_path / "copy")
        for change in changes:
            change(copy, data.draw)  # pyright: ignore[reportArgumentType]
        assert not complaints(copy), [change.__name__ for change in changes]

    change_harmlessly()
