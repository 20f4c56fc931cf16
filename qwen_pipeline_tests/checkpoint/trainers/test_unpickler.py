"""Pickles that take memory: refused before they do."""

import pickle
import struct

import pytest

from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.checkpoint.trainers.unpickler import load_pickle
from qwen_pipeline.errors import CheckpointRefused


@pytest.mark.parametrize("keep", [b"r" + struct.pack("<I", 2**28), b"p268435456\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_value_that_is_kept_under_a_huge_number_is_refused(keep: bytes) -> None:
    """Python's own unpickler takes 4 GiB for it."""
    before = resident_peak()
    with pytest.raises(CheckpointRefused, match="under the number 268435456"):
        load_pickle(b"N" + keep + b".", source="file")
    assert resident_peak() - before < 2**26


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(protocol: int) -> None:
    value = {f"key {number}": [number, (number, str(number))] for number in range(1000)}
    assert load_pickle(pickle.dumps(value, protocol), source="file") == value


def test_a_cut_pickle_is_refused() -> None:
    with pytest.raises(CheckpointRefused, match="not a valid checkpoint file"):
        load_pickle(pickle.dumps({"key": 1})[:-3], source="file")
