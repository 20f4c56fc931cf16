"""Inputs whose digest is known, or is found while they are read: no input is read only to learn what it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.digest import appearance, checkpoint_digest, known_checkpoint, remember
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
        checkpoint: To be read from.
        digest: Its content digest, or :data:`UNREAD`.
        appearance: What it looks like from outside.
        readers: See it being read, and what it is made of, if the digest has to be found.
        settle: Returns the content digest once the taps are settled.
    """

    checkpoint: Checkpoint
    digest: str
    appearance: str
    readers: Sequence[HashingReader]
    settle: Callable[[], str]


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
        open_root: Opens it.
        read_now: Whether to read it at once if its digest is not known: something made from it may be there.
        observe: Told about bytes read.
    """
    checkpoint, looks = open_root(root), appearance(root)
    is_known = known_checkpoint(root) is not None
    if not (is_known and read_now):
        read_ahead(dict.fromkeys(root / shard for shard in checkpoint.shards.values()))
    if read_now or is_known:
        digest = checkpoint_digest(root, observe=observe)
        return StageInput(checkpoint=checkpoint, digest=digest, appearance=looks, readers=(), settle=lambda: digest)
    reader = HashingReader(role, checkpoint)

    def settle() -> str:
        if appearance(root) != looks:
            raise CheckpointRefused(
                f"{root} was changed while it was read.", remedy="Run again once it stays as it is."
            )
        return remember(root, checkpoint, reader.seen).digest

    return StageInput(checkpoint=reader.checkpoint, digest=UNREAD, appearance=looks, readers=(reader,), settle=settle)
