"""Hashing of tensors, files and shards: block by block, on a few threads."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.manifest import Contents, FileDigest, ShardDigest, TensorDigest
from qwen_pipeline.checkpoint.safetensors_file import ITEM_BYTES, TensorSpec, as_bytes, read_header
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.checkpoint.tree_hash import TreeHash
from qwen_pipeline.progress import Meter, Observe, unobserved

if TYPE_CHECKING:
    import torch


ROW_ALIGNMENT = 64
"""Blocks of at least this many rows begin at a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedTensor:
    """The hash result of a tensor. ``finite`` is whether it has no NaN and no infinity; None if unchecked."""

    digest: TensorDigest
    finite: bool | None = None


HashedTensors = Mapping[str, HashedTensor]


class TensorHasher:
    """Hashes a tensor from its blocks, which any thread may add in any order.

    Args:
        spec: The tensor's dtype and shape.
        check_finite: Whether to look for NaN and infinities too.
    """

    def __init__(self, spec: TensorSpec, *, check_finite: bool = True) -> None:
        self._spec = spec
        self._hash = TreeHash(spec.nbytes)
        self._finite = True if check_finite else None

    def update(self, start: int, block: "torch.Tensor") -> bool:
        """Add the block that begins at byte ``start``; return False once a value was not finite."""
        if self._finite and not is_finite(block):
            self._finite = False
        self._hash.add(start, as_bytes(block))
        return self._finite is not False

    @property
    def result(self) -> HashedTensor | None:
        """The hash result, or None while bytes are missing."""
        if not self._hash.is_complete:
            return None
        digest = TensorDigest(dtype=self._spec.dtype, shape=self._spec.shape, tree_blake3=self._hash.hexdigest())
        return HashedTensor(digest=digest, finite=self._finite)


def hash_checkpoint(checkpoint: Checkpoint, root: Path, *, observe: Observe = unobserved) -> Contents:
    """Read and hash every tensor and sidecar of a stored checkpoint; shards are not hashed as files."""
    tensors = hash_tensors(checkpoint.tensors, task=f"digest {root.name}", observe=observe)
    return Contents(
        tensors={name: tensor.digest for name, tensor in tensors.items()},
        files=digest_files({CONFIG: root / CONFIG, **checkpoint.sidecars}),
    )


def hash_tensors(
    tensors: Mapping[str, LazyTensor], *, task: str, observe: Observe = unobserved
) -> dict[str, HashedTensor]:
    """Read and hash tensors on all cores."""
    hashers = {name: TensorHasher(tensor.spec) for name, tensor in tensors.items()}
    meter = Meter(task, sum(tensor.spec.nbytes for tensor in tensors.values()), observe)
    blocks = ((name, block) for name, tensor in tensors.items() for block in blocks_of(tensor))

    def read(job: tuple[str, Block]) -> None:
        name, block = job
        loaded = block.load()
        hashers[name].update(block.start, loaded)
        meter.add(loaded.nbytes)

    map_ordered(blocks, read, tick=meter.report)
    return {name: _complete_result(name, hasher) for name, hasher in hashers.items()}


def digest_files(files: Mapping[str, Path]) -> dict[str, FileDigest]:
    """Hash files, relative path -> file; return relative path -> digest."""
    return {relative: digest_file(path) for relative, path in sorted(files.items())}


def digest_file(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def digest_shard(path: Path) -> ShardDigest:
    """Hash the header of a safetensors file; its tensors have digests of their own."""
    return ShardDigest(bytes=path.stat().st_size, header_sha256=hashlib.sha256(read_header(path)).hexdigest())


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive bytes of a tensor, from byte ``start`` on, not loaded yet."""

    start: int
    load: Callable[[], "torch.Tensor"]


def blocks_of(tensor: LazyTensor) -> Iterator[Block]:
    """Yield a tensor in blocks of at most :data:`BLOCK_BYTES`.

    Stored bytes are divided anywhere. Computed ones are divided between rows, so that a block has at least one row.
    """
    if not tensor.spec.nbytes:
        yield Block(0, lambda: tensor.read(0, tensor.spec.rows))
    elif stored := tensor.stored:
        item = ITEM_BYTES[tensor.spec.dtype]
        elements, most = tensor.spec.nbytes // item, BLOCK_BYTES // item
        for start in range(0, elements, most):
            yield Block(start * item, _loader(stored.load, start, min(start + most, elements)))
    else:
        for start, stop in block_ranges(tensor.spec):
            yield Block(start * tensor.spec.row_bytes, _loader(tensor.read, start, stop))


def block_ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield the rows ``start:stop`` of each block of a tensor."""
    rows = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
    rows -= rows % ROW_ALIGNMENT if rows > ROW_ALIGNMENT else 0
    for start in range(0, spec.rows, rows):
        yield start, min(start + rows, spec.rows)


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether there is no NaN and no infinity, for which 8-bit floats are copied.

    E4M3 has no infinity, and all bits of a NaN but its sign are set, which is found in a fraction of a copy's time.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype is torch.float8_e4m3fn:
        return int(tensor.view(torch.uint8).bitwise_and(0x7F).max()) != 0x7F
    comparable = tensor.half() if tensor.itemsize == 1 else tensor
    return all(isfinite(extreme.item()) for extreme in comparable.aminmax())


def _loader(load: Callable[[int, int], "torch.Tensor"], start: int, stop: int) -> Callable[[], "torch.Tensor"]:
    return lambda: load(start, stop)


def _complete_result(name: str, hasher: TensorHasher) -> HashedTensor:
    result = hasher.result
    assert result, f"{name} was not read to its end"
    return result
