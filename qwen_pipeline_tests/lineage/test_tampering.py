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
from qwen_pipeline_tests.lineage.deeds import DEEDS, HARMLESS, STAGES, Tampered

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
    @given(data=st.data(), deed=st.sampled_from(DEEDS))
    def tamper(data: st.DataObject, deed: Callable[[Chained, st.DrawFn], Tampered]) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = chained.copy(tmp_path / "copy")
        tampered = deed(copy, data.draw)  # pyright: ignore[reportArgumentType]
        found = complaints(copy, tampered.signers)
        assert found, tampered.deed
        assert tampered.named in found, tampered.deed

    assert not complaints(chained)
    tamper()


@pytest.mark.parametrize("number", [FEW // 4, pytest.param(MANY // 4, marks=pytest.mark.slow)])
def test_nothing_else_is_complained_about(chained: Chained, tmp_path: Path, number: int) -> None:
    """What happens to a sound store every day, and several of it in any order, is no contradiction."""

    @examples(number)
    @given(data=st.data(), deeds=st.lists(st.sampled_from(HARMLESS), min_size=1, max_size=4, unique=True))
    def live(data: st.DataObject, deeds: list[Callable[[Chained, st.DrawFn], None]]) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = chained.copy(tmp_path / "copy")
        for deed in deeds:
            deed(copy, data.draw)  # pyright: ignore[reportArgumentType]
        assert not complaints(copy), [deed.__name__ for deed in deeds]

    live()
