"""A tensor's digest is that of docs/format.md, however its bytes arrive."""

import hashlib
from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.checkpoint import tree_hash
from qwen_pipeline.checkpoint.crew import work_in_order
from qwen_pipeline.checkpoint.tree_hash import TreeHash

LEAF = 16
Piece = tuple[int, int]


def naive(data: bytes, leaf: int = 2**23) -> str:
    blocks = [data[at : at + leaf] for at in range(0, len(data), leaf)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def brought(data: bytes, pieces: list[Piece]) -> TreeHash:
    """Hash pieces, ``(start, end)``, each in a job of its own."""
    tree = TreeHash(len(data))
    work_in_order(pieces, lambda piece: tree.add(piece[0], memoryview(data)[slice(*piece)]))
    return tree


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (5, "768a07c1dee8e668bcf5982658abf8ee1fdaa6378c342192a51dcfae2a672ac3"),
        (2 * 2**23 + 3, "c9bdfc9df1d1bbbf9dffa3d94d1b6f4dff1ead956c52fc74843d6d43773a8150"),
    ],
)
def test_golden_digests(length: int, expected: str) -> None:
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    cuts = [*range(0, length, 3 * 2**21 + 1), length]
    tree = brought(data, list(pairwise(cuts)))

    assert tree.is_complete
    assert tree.hexdigest() == naive(data) == expected


@given(
    data=st.binary(max_size=100),
    cuts=st.sets(st.integers(0, 100)),
    stretch=st.lists(st.integers(0, 20), min_size=102, max_size=102),
    again=st.booleans(),
)
def test_pieces_of_any_size_that_overlap_or_come_twice_give_the_digest_of_the_whole(
    data: bytes, cuts: set[int], stretch: list[int], again: bool
) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [(max(0, start - stretch[n]), end) for n, (start, end) in enumerate(pairwise(edges))]
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = brought(data, pieces + pieces * again)
        assert tree.is_complete
        assert tree.hexdigest() == naive(data, LEAF)


@given(order=st.permutations(range(6)))
def test_whole_blocks_count_in_any_order(order: list[int]) -> None:
    data = bytes(range(6 * LEAF))
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = brought(data, [(n * LEAF, (n + 1) * LEAF) for n in order])
        assert tree.hexdigest() == naive(data, LEAF)


def test_a_digest_with_a_part_missing_is_incomplete_and_nothing_waits_for_it() -> None:
    data = bytes(100)
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = brought(data, [(0, 20), (21, 100)])
        assert not tree.is_complete


def test_outside_of_a_job_nothing_is_taken() -> None:
    tree = TreeHash(5)
    tree.add(0, memoryview(b"bytes"))
    assert not tree.is_complete
