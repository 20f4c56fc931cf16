"""The weights in a trainer's directory, whatever it is called: which layout it has, and which files are not weights."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import PICKLES, SIDECARS
from qwen_pipeline.checkpoint.trainers.deepspeed import is_zero, open_zero
from qwen_pipeline.checkpoint.trainers.distributed import is_distributed, open_distributed
from qwen_pipeline.checkpoint.trainers.state_dicts import NON_LORA, open_state_dicts, shards_of
from qwen_pipeline.checkpoint.trainers.unpickler import MALFORMED, damaged
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights
from qwen_pipeline.errors import CheckpointRefused, listed

_INDEX = "pytorch_model.bin.index.json"
_STATE_DICTS = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "adapter_model.bin")
_ADAPTER = ("adapter_model.bin", "adapter_model.safetensors")
_NO_WEIGHTS = (
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "random_states_*", "scaler.pt", "sampler*",
    "custom_checkpoint_*", "dataloader*", *SIDECARS,
)  # fmt: skip
_LATEST = "latest"
Opener = Callable[[], TrainedWeights]


def open_trained(root: Path) -> TrainedWeights:
    """Open the weights of a trainer's checkpoint: a file, a directory of files, or one that contains such a directory.

    Raises:
        CheckpointRefused: There are none, or there are several and it is unclear which are meant; or they cannot be
            read safely and completely.
    """
    if root.is_file():
        return _open(lambda: open_state_dicts([root]), root)
    if not root.is_dir():
        raise CheckpointRefused(f"{root} does not exist.", remedy="Pass a checkpoint that a trainer saved.")
    found = dict(_candidates(root))
    if len(found) == 1:
        (opener,) = found.values()
        return _open(opener, root)
    if found:
        raise CheckpointRefused(
            f"{root} holds several checkpoints: {listed(sorted(found))}.",
            remedy="Pass the path of one of them; config and tokenizer are then taken from this directory.",
        )
    if weights := sorted(path.name for path in root.glob("*.safetensors")):
        raise CheckpointRefused(
            f"{root} holds {listed(weights)} and no other weights: there is nothing to convert.",
            remedy="Copy it to the inbox, or pass it to merge, as it is.",
        )
    raise CheckpointRefused(
        f"{root} holds no weights that a trainer saves.",
        remedy="Pass a file of torch.save, or a directory with pytorch_model.bin, global_step*/ or .metadata.",
    )


def _open(opener: Opener, root: Path) -> TrainedWeights:
    try:
        return opener()
    except MALFORMED as error:
        raise damaged(root, repr(error)) from error


def _candidates(root: Path) -> Iterator[tuple[str, Opener]]:
    """Yield the name of each checkpoint in a directory, and a function that opens it."""
    if is_zero(root):
        yield f"{root.name}/*_states.pt", lambda: open_zero(root)
    for step in _steps(root):
        yield f"{step.name}/", lambda step=step: open_zero(step)
    for directory in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if is_distributed(directory) and not _is_optimizer(directory):
            yield f"{directory.name}/.metadata", lambda directory=directory: open_distributed(directory)
    if (index := root / _INDEX).is_file():
        yield _INDEX, lambda: _open_index(index)
    yield from _files(root)


def _steps(root: Path) -> list[Path]:
    """Return the directory of the step that ``latest`` names; without it, those of all steps."""
    latest = root / _LATEST
    try:
        names = [latest.read_text().strip()] if latest.is_file() else [path.name for path in root.glob("global_step*")]
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(latest, str(error)) from error
    return sorted(root / name for name in names if Path(name).name == name and is_zero(root / name))


def _is_optimizer(directory: Path) -> bool:
    return directory.name.startswith("optimizer")


def _open_index(index: Path) -> TrainedWeights:
    shards, owners = shards_of(index)
    return open_state_dicts(shards, owners=owners)


def _files(root: Path) -> Iterator[tuple[str, Opener]]:
    if (beside := root / NON_LORA).is_file():
        adapters = [root / name for name in _ADAPTER if (root / name).is_file()]
        yield NON_LORA, lambda: open_state_dicts([*adapters, beside])
        return
    usual = [root / name for name in _STATE_DICTS if (root / name).is_file()]
    others = [path for path in sorted(root.iterdir()) if path.is_file() and _may_hold_weights(path.name)]
    is_indexed = (root / _INDEX).is_file() or is_zero(root)
    for path in usual or ([] if is_indexed else others):
        yield path.name, lambda path=path: open_state_dicts([path])


def _may_hold_weights(name: str) -> bool:
    return any(fnmatch(name, glob) for glob in PICKLES) and not any(fnmatch(name, glob) for glob in _NO_WEIGHTS)
