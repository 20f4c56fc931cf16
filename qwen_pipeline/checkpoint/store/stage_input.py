"""The inputs of a stage, whose digests are known, or are computed while the stage reads them, without an extra read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import DigestCache, checkpoint_digest, fingerprint
from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import UNREAD
from qwen_pipeline.checkpoint.page_cache import read_ahead
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.progress import Observe, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """One input of a stage.

    Attributes:
        checkpoint: The checkpoint to read from.
        digest: Its content digest, or :data:`UNREAD`.
        fingerprint: See :func:`fingerprint`.
        readers: Hash the checkpoint, and its own inputs, while it is read; empty if the digest is known.
        final_digest: Returns the content digest, once the readers have finished.
    """

    checkpoint: Checkpoint
    digest: str
    fingerprint: str
    readers: Sequence[HashingReader]
    final_digest: Callable[[], str]


def open_input(
    role: str,
    root: Path,
    *,
    open_root: Callable[[Path], Checkpoint] = open_checkpoint,
    read_now: bool = False,
    observe: Observe = unobserved,
) -> StageInput:
    """Open a model directory as an input.

    Args:
        role: Name of the input in the derivation.
        root: The directory.
        open_root: Opens the directory.
        read_now: Whether to compute an unknown digest at once, since the stage's output may exist already.
        observe: Called with the progress.
    """
    checkpoint, before = open_root(root), fingerprint(root)
    known = DigestCache().find(root)
    if not (known and read_now):
        read_ahead(dict.fromkeys(root / shard for shard in checkpoint.shards.values()))
    if read_now or known:
        digest = known.digest if known else checkpoint_digest(root, observe=observe)
        return StageInput(
            checkpoint=checkpoint, digest=digest, fingerprint=before, readers=(), final_digest=lambda: digest
        )
    reader = HashingReader(role, checkpoint)

    def final_digest() -> str:
        if fingerprint(root) != before:
            raise CheckpointRefused(
                f"{root} was changed while it was read.",
                remedy="Wait until its files stop changing, then run again.",
            )
        return DigestCache().add(root, checkpoint, reader.results).digest

    return StageInput(
        checkpoint=reader.checkpoint,
        digest=UNREAD,
        fingerprint=before,
        readers=(reader,),
        final_digest=final_digest,
    )
