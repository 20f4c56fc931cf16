"""A tensor's digest is that of docs/format.md, in whatever parts and order its bytes are added."""

import tracemalloc
from itertools import pairwise
from threading import Barrier
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.checkpoint import tree_hash
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.checkpoint.tree_hash import TreeHash
from qwen_pipeline_tests.checkpoint.copies import tree_digest

LEAF = 16
Piece = tuple[int, int]


def hash_pieces(data: bytes, pieces: list[Piece]) -> TreeHash:
    """Hash pieces, ``(start, end)``, on several threads."""
    tree = TreeHash(len(data))
    map_ordered(pieces, lambda piece: tree.add(piece[0], memoryview(data)[slice(*piece)]))
    return tree


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (5, "30c7f2e20b6fb09bf904cafd13c57fa5eb16cf95d978adef0fd1497561c3a902"),
        (2 * 2**23 + 3, "b3ba80be8ecb27026f48c777c83dd8326edb849a9c33d55130c03d1377974ae5"),
    ],
)
def test_golden_digests(length: int, expected: str) -> None:
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    cuts = [*range(0, length, 3 * 2**21 + 1), length]
    tree = hash_pieces(data, list(pairwise(cuts)))

    assert tree.is_complete
    assert tree.hexdigest() == tree_digest(data) == expected


@given(
    data=st.binary(max_size=100),
    cuts=st.sets(st.integers(0, 100)),
    stretch=st.lists(st.integers(0, 20), min_size=102, max_size=102),
    again=st.booleans(),
)
def test_pieces_of_any_size_that_overlap_or_repeat_give_the_digest_of_the_whole(
    data: bytes, cuts: set[int], stretch: list[int], again: bool
) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [(max(0, start - stretch[n]), end) for n, (start, end) in enumerate(pairwise(edges))]
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = hash_pieces(data, pieces + pieces * again)
        assert tree.is_complete
        assert tree.hexdigest() == tree_digest(data, LEAF)


PARTS = [*pairwise([*range(0, 6 * LEAF, 5), 6 * LEAF])]


@given(order=st.permutations(PARTS))
def test_parts_can_be_added_in_any_order(order: list[Piece]) -> None:
    data = bytes(range(6 * LEAF))
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = TreeHash(len(data))
        for start, end in order:
            tree.add(start, memoryview(data)[start:end])
        assert tree.hexdigest() == tree_digest(data, LEAF)


def test_several_threads_can_add_the_same_bytes_at_once() -> None:
    data = bytes(range(256)) * 2**13
    together = Barrier(3)
    tree = TreeHash(len(data))

    def add(cut: int) -> None:
        together.wait(10)
        for start in range(0, len(data), cut):
            tree.add(start, memoryview(data)[start : start + cut])

    map_ordered([300_007, 700_001, 524_287], add)
    assert tree.hexdigest() == tree_digest(data)


def test_a_digest_with_a_part_missing_is_incomplete() -> None:
    data = bytes(100)
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        tree = hash_pieces(data, [(0, 20), (21, 100)])
        assert not tree.is_complete


def test_the_oldest_of_too_many_partial_leaves_are_dropped() -> None:
    most = tree_hash.MAX_PARTIAL_LEAVES
    data = bytes(2 * most * LEAF)
    begins = range(0, len(data), LEAF)
    tree = TreeHash(len(data))
    with patch.object(tree_hash, "LEAF_BYTES", LEAF):
        for begin in begins:
            tree.add(begin, memoryview(data)[:1])
        for begin in reversed(begins[most:]):
            tree.add(begin + 1, memoryview(data)[: LEAF - 1])
        tree.add(0, memoryview(data)[: most * LEAF - 1])
        assert not tree.is_complete
        tree.add((most - 1) * LEAF, memoryview(data)[:LEAF])
        assert tree.hexdigest() == tree_digest(data, LEAF)


def test_a_complete_digest_keeps_no_leaf() -> None:
    """Every tensor's digest is kept to the end: anything else that it kept would grow with the model."""
    tracemalloc.start()
    data = bytes(4 * tree_hash.LEAF_BYTES)
    cut = tree_hash.LEAF_BYTES // 2
    trees = [TreeHash(len(data)) for _ in range(8)]
    before = tracemalloc.get_traced_memory()[0]
    for tree in trees:
        for start, end in pairwise([0, cut, 3 * cut, len(data)]):
            tree.add(start, memoryview(data)[start:end])
    assert all(tree.is_complete for tree in trees)
    assert tracemalloc.get_traced_memory()[0] - before < tree_hash.LEAF_BYTES
    tracemalloc.stop()
