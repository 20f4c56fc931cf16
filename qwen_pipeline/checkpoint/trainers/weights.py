"""The weights in a trainer's checkpoint, of any layout, under the names of the model that was wrapped for training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.errors import CheckpointRefused, listed

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Modules that torch.compile, FSDP, activation checkpointing and Lightning put around another one, anywhere."""
_PARALLEL = "module."
"""The prefix of data parallelism, at the beginning only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeights:
    """The weights of one training.

    Attributes:
        layout: The layout that they were read from, for people.
        tensors: Name without wrappers -> tensor.
        files: Every file that was opened.
        aliases: Name -> the name of another tensor that is the same memory, or was in training.
        frozen: Names of the tensors that were not trained, as far as the layout distinguishes them.
        beside: Names of trained tensors that an adapter's own file leaves out.
        unused: The other contents of the files, for people: optimizer states, counters.
    """

    layout: str
    tensors: Mapping[str, LazyTensor]
    files: Sequence[Path]
    aliases: Mapping[str, str]
    frozen: Collection[str] = ()
    beside: Collection[str] = ()
    unused: Sequence[str] = ()


def without_wrappers(name: str) -> str:
    """Return a tensor's name in the model, from its name in a wrapped one."""
    while name.startswith(_PARALLEL):
        name = name.removeprefix(_PARALLEL)
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_names(names: Collection[str], *, source: Path | str) -> dict[str, str]:
    """Return stored name -> name without wrappers.

    Raises:
        CheckpointRefused: Two tensors have the same name without wrappers.
    """
    plain = {name: without_wrappers(name) for name in names}
    owners: dict[str, str] = {}
    for stored, name in plain.items():
        if name in owners:
            raise CheckpointRefused(
                f"{source} holds {owners[name]} and {stored}, which are one tensor, {name}, without wrappers.",
                remedy="It mixes the state dicts of two models, such as a model and its average: save one of them.",
            )
        owners[name] = stored
    return plain


def require_weights(tensors: Mapping[str, LazyTensor], source: Path, found: Sequence[str]) -> None:
    """Refuse a checkpoint without weights, or with weights without values.

    Raises:
        CheckpointRefused: There is no tensor, or one of them is empty, as on a rank of a sharded training.
    """
    if not tensors:
        raise CheckpointRefused(
            f"{source} holds no weights; it holds {listed(found) or 'nothing'}.",
            remedy="Pass the file or the directory that has them: pytorch_model*.bin, global_step*/, or a directory"
            " with .metadata.",
        )
    if empty := [name for name, tensor in tensors.items() if 0 in tensor.spec.shape]:
        raise CheckpointRefused(
            f"{source} has tensors without values: {listed(empty)}. A rank of a sharded training saved its own part.",
            remedy="Pass the training's own checkpoint, such as its global_step*/, with the files of all ranks.",
        )
