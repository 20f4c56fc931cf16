"""The digest of a tensor: BLAKE3 over the BLAKE3 of each of its blocks, so that all cores hash one tensor together.

Blocks of the digest lie where the format says (docs/format.md), whatever blocks a tensor is read, computed or written
in. Nobody waits: where a block comes in parts, they are kept until the last one is there. A core with AVX-512 hashes
6 GB/s so, where SHA-256 with instructions of its own takes 1.7 (https://github.com/BLAKE3-team/BLAKE3).
"""

from threading import Lock

from blake3 import blake3

LEAF_BYTES = 2**20
"""Bytes of every block of a digest but the last. A MUST of the format."""
MOST_STARTED = 64
"""Blocks of which only parts came, at most: two for each of the threads that a tensor is read with, and some."""


class TreeHash:
    """The digest of ``nbytes`` bytes that several threads bring, each its own parts, in any order.

    Parts may overlap, and bytes count once. Of many blocks with holes the oldest are forgotten, and
    :attr:`is_complete` stays false, so that memory has a bound.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._started: dict[int, _Leaf] = {}
        self._digests: dict[int, bytes] = {}
        self._spare: list[bytearray] = []
        self._lock = Lock()

    def add(self, start: int, view: memoryview) -> None:
        """Take the bytes from ``start`` on."""
        end = start + len(view)
        for begin in range(start - start % LEAF_BYTES, end, LEAF_BYTES):
            low, high = max(begin, start), min(begin + LEAF_BYTES, end)
            self._add_to_leaf(begin, low - begin, view[low - start : high - start])

    @property
    def is_complete(self) -> bool:
        return len(self._digests) == -(-self._nbytes // LEAF_BYTES)

    def hexdigest(self) -> str:
        assert self.is_complete, "bytes are missing"
        return blake3(b"".join(self._digests[begin] for begin in sorted(self._digests))).hexdigest()

    def _add_to_leaf(self, begin: int, start: int, view: memoryview) -> None:
        if begin in self._digests:
            return
        size = min(LEAF_BYTES, self._nbytes - begin)
        if len(view) == size:
            self._finish(begin, view)
        elif whole := self._leaf(begin, size).add(start, view):
            self._finish(begin, memoryview(whole)[:size])
            self._recycle(whole)

    def _leaf(self, begin: int, size: int) -> "_Leaf":
        with self._lock:
            if begin not in self._started:
                self._started[begin] = _Leaf(size, self._spare.pop() if self._spare else bytearray(LEAF_BYTES))
            if len(self._started) > MOST_STARTED:
                del self._started[next(iter(self._started))]
            return self._started[begin]

    def _finish(self, begin: int, data: memoryview) -> None:
        digest = blake3(data).digest()
        with self._lock:
            self._digests[begin] = digest
            self._started.pop(begin, None)
            if self.is_complete:
                self._spare.clear()

    def _recycle(self, buffer: bytearray) -> None:
        with self._lock:
            if not self.is_complete:
                self._spare.append(buffer)


class _Leaf:
    """One block of which parts have come, in a buffer of that size or more."""

    def __init__(self, size: int, buffer: bytearray) -> None:
        self._size = size
        self._buffer: bytearray | None = buffer
        self._parts: list[tuple[int, int]] = []
        self._lock = Lock()

    def add(self, start: int, view: memoryview) -> bytearray | None:
        """Take the bytes from ``start`` on; return the buffer once none is missing, and take nothing after that."""
        end = start + len(view)
        with self._lock:
            if self._buffer is None:
                return None
            memoryview(self._buffer)[start:end] = view
            self._parts = _united([*self._parts, (start, end)])
            if self._parts != [(0, self._size)]:
                return None
            whole, self._buffer = self._buffer, None
            return whole


def _united(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that touch or overlap as one."""
    united: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return united
