"""State dicts that ``torch.save`` wrote: one file, or shards with an index, or an adapter's with what it leaves out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import LazyTensor, stored_tensor
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.checkpoint.trainers.torch_file import StoredView, kind_of, open_torch_file
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights, plain_names, require_weights
from qwen_pipeline.errors import CheckpointRefused, listed

_NESTED = ("state_dict", "model_state_dict", "module", "model")
"""Keys below which trainers save a model's state dict beside other values (Lightning, DeepSpeed, plain torch)."""
NON_LORA = "non_lora_state_dict.bin"
"""Trained tensors that are not part of a LoRA, as LLaVA's trainer and its relatives for Qwen-VL save them."""


def open_state_dicts(paths: Sequence[Path], *, owners: Mapping[str, str] | None = None) -> TrainedWeights:
    """Read state dicts whose tensors belong to one model.

    Args:
        paths: The files; of a model's shards, all of them. Files of safetensors may be among them.
        owners: Tensor name -> name of its file, as the index states it.

    Raises:
        CheckpointRefused: A file is not a state dict, two hold the same tensor, or the index does not agree with them.
    """
    views: dict[str, StoredView] = {}
    tensors: dict[str, LazyTensor] = {}
    files: dict[str, Path] = {}
    unused: list[str] = []
    for path in paths:
        found, others = _tensors_of(path)
        if twice := sorted(files.keys() & found.keys()):
            raise CheckpointRefused(
                f"{path} and {files[twice[0]]} both hold {listed(twice)}.",
                remedy="Keep the files of one save: those of two are mixed.",
            )
        files |= dict.fromkeys(found, path)
        views |= {name: each for name, each in found.items() if isinstance(each, StoredView)}
        tensors |= {name: each.lazy() if isinstance(each, StoredView) else each for name, each in found.items()}
        unused += others
    if owners is not None:
        _require_agreement(paths[0].parent, owners, {name: path.name for name, path in files.items()})
    require_weights(tensors, paths[0], unused)
    plain = plain_names(tensors, source=paths[0])
    return TrainedWeights(
        layout="state dict",
        tensors={plain[name]: tensor for name, tensor in tensors.items()},
        files=tuple(paths),
        aliases={plain[name]: plain[first] for name, first in _shared(views)},
        beside={plain[name] for name, path in files.items() if path.name == NON_LORA},
        unused=unused,
    )


def shards_of(index: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the shards that an index of ``.bin`` files names, and tensor name -> file name.

    Raises:
        CheckpointRefused: The index has no map, or names a file that is missing or elsewhere.
    """
    owners = load_json(index).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise CheckpointRefused(f"{index} has no weight_map.", remedy="Save the checkpoint again.")
    owners = {str(name): str(file) for name, file in cast("dict[Any, Any]", owners).items()}
    names = sorted(set(owners.values()))
    if wrong := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise CheckpointRefused(
            f"{index} names {listed(wrong)}, which are not beside it.",
            remedy="Fetch the missing files, then run again.",
        )
    return [index.parent / name for name in names], owners


def _tensors_of(path: Path) -> tuple[dict[str, StoredView | LazyTensor], list[str]]:
    """Return the tensors of one file, and descriptions of its other values."""
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        return {name: stored_tensor(file, name) for name in file.specs}, []
    return tensors_in(open_torch_file(path), path)


def tensors_in(value: Any, path: Path) -> tuple[dict[str, StoredView | LazyTensor], list[str]]:
    """Return the state dict in a saved value, at its top or one key below, and descriptions of what is beside it."""
    if not isinstance(value, dict):
        raise CheckpointRefused(
            f"{path} holds a {kind_of(value)}, expected a dict of tensors.",
            remedy="Save model.state_dict(), not the model.",
        )
    table = cast("dict[Any, Any]", value)
    found = {str(name): each for name, each in table.items() if isinstance(each, StoredView)}
    others = {str(name): each for name, each in table.items() if not isinstance(each, StoredView)}
    if not found:
        for key in _NESTED:
            if isinstance(others.get(key), dict):
                inner, beside = tensors_in(others.pop(key), path)
                return inner, [*beside, *_described(others)]
    return cast("dict[str, StoredView | LazyTensor]", found), list(_described(others))


def _described(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        size = f" of {len(cast('list[Any]', value))}" if isinstance(value, (dict, list)) else ""
        yield f"{name} ({kind_of(value)}{size})"


def _shared(views: Mapping[str, StoredView]) -> Iterator[tuple[str, str]]:
    """Yield (name, earlier name) of tensors that are the same view of the same storage."""
    first: dict[StoredView, str] = {}
    for name, view in views.items():
        if view in first:
            yield name, first[view]
        first.setdefault(view, name)


def _require_agreement(root: Path, owners: Mapping[str, str], found: Mapping[str, str]) -> None:
    if wrong := sorted(name for name in owners.keys() | found.keys() if owners.get(name) != found.get(name)):
        shown = [f"{name}: index {owners.get(name)}, found in {found.get(name)}" for name in wrong]
        raise CheckpointRefused(
            f"The index of {root} does not agree with its shards: {listed(shown)}.",
            remedy="The upload or download is incomplete, or mixes the files of two saves: fetch it again.",
        )
