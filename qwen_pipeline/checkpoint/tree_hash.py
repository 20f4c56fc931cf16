"""The digest of a tensor: SHA-256 over the SHA-256 of each of its blocks, so that all cores hash one tensor together.

Blocks of the digest lie where the format says (docs/format.md), whatever blocks a tensor is read, computed or written
in: a job that brings the end of one waits for the job that brings its beginning, which gives that first of all.
"""

import hashlib
from threading import Lock

from qwen_pipeline.checkpoint.crew import take_turn, tell_waiting

LEAF_BYTES = 8 * 2**20
"""Bytes of every block of a digest but the last. A MUST of the format."""


class TreeHash:
    """The digest of ``nbytes`` bytes that several jobs bring, each its own part, in any order.

    Parts may overlap, and bytes count once. If the beginning of a block comes from no job begun earlier than the one
    that brings its end, the end is passed over and :attr:`is_complete` stays false.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._begun: dict[int, _Leaf] = {}
        self._digests: dict[int, bytes] = {}
        self._lock = Lock()

    def add(self, start: int, view: memoryview) -> None:
        """Take the bytes from ``start`` on. Outside of a job nothing is taken."""
        end = start + len(view)
        for begin in reversed(range(start - start % LEAF_BYTES, end, LEAF_BYTES)):
            low, high = max(begin, start), min(begin + LEAF_BYTES, end)
            self._add_to_leaf(begin, low - begin, view[low - start : high - start])

    @property
    def is_complete(self) -> bool:
        return len(self._digests) == -(-self._nbytes // LEAF_BYTES)

    def hexdigest(self) -> str:
        assert self.is_complete, "bytes are missing"
        return hashlib.sha256(b"".join(self._digests[begin] for begin in sorted(self._digests))).hexdigest()

    def _add_to_leaf(self, begin: int, start: int, view: memoryview) -> None:
        with self._lock:
            if begin in self._digests:
                return
            leaf = self._begun.setdefault(begin, _Leaf())
        leaf.add(start, view)
        if leaf.done == min(LEAF_BYTES, self._nbytes - begin):
            with self._lock:
                self._digests[begin] = leaf.digest()
                self._begun.pop(begin, None)


class _Leaf:
    """SHA-256 of one block, whose bytes come in order."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._claimed = 0
        self.done = 0

    def add(self, start: int, view: memoryview) -> None:
        """Take the bytes from ``start`` on when it is their turn."""
        end = start + len(view)
        if take_turn(lambda: self._claimed == self.done >= start, lambda: self._claim(start, end)):
            self._sha.update(view[self.done - start :])
            tell_waiting(lambda: self._pass(end))

    def digest(self) -> bytes:
        return self._sha.digest()

    def _claim(self, start: int, end: int) -> bool:
        due = start <= self.done == self._claimed < end
        self._claimed = end if due else self._claimed
        return due

    def _pass(self, end: int) -> None:
        self.done = end
