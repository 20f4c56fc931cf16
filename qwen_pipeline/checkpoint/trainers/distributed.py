"""Checkpoints of ``torch.distributed.checkpoint``, as FSDP trainers save them, without a process group.

``.metadata`` is a pickle with the shape and the chunks of each tensor and the place of each chunk, a file of
``torch.save`` within a ``__<rank>_<n>.distcp`` (https://github.com/pytorch/pytorch,
``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``, 2.13). Accelerate puts the model below the key
``model``; torchtitan and others save it at the top.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.trainers.pieces import Chunk, assembled, obstacle_of
from qwen_pipeline.checkpoint.trainers.torch_file import Dtype, StoredView, open_torch_file, torch_names
from qwen_pipeline.checkpoint.trainers.unpickler import Record, damaged, load_pickle
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights, plain_names, require_weights
from qwen_pipeline.errors import CheckpointRefused, listed

METADATA = ".metadata"
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "app")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The place of a chunk: a range of bytes of a file."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metadata:
    """The contents of ``.metadata``.

    Attributes:
        tensors: Flat name -> dtype, shape, and (offsets, shape) of each chunk.
        paths: Flat name -> keys of the nested value; without it, the flat name is the only key.
        places: Flat name and offsets -> the place of the chunk.
        others: Flat names of values that are not tensors.
    """

    tensors: Mapping[str, tuple[TensorSpec, list[tuple[Shape, Shape]]]]
    paths: Mapping[str, tuple[str, ...]]
    places: Mapping[tuple[str, Shape], _Place]
    others: tuple[str, ...]


def is_distributed(root: Path) -> bool:
    return (root / METADATA).is_file()


def open_distributed(root: Path) -> TrainedWeights:
    """Open a directory of ``*.distcp`` files with ``.metadata``.

    Raises:
        CheckpointRefused: The metadata names anything else than PyTorch's own classes, a file or a chunk is missing, or
            the directory holds no model.
    """
    metadata = _load_metadata(root / METADATA)
    names, unused = _model_names(metadata, root)
    tensors = {name: _tensor(root, metadata, flat) for flat, name in names.items()}
    require_weights(tensors, root, unused)
    plain = plain_names(tensors, source=root)
    used = {place.file for (flat, _), place in metadata.places.items() if flat in names}
    return TrainedWeights(
        layout=f"torch.distributed.checkpoint of {len(used)} files",
        tensors={plain[name]: tensor for name, tensor in tensors.items()},
        files=(root / METADATA, *(root / file for file in sorted(used))),
        aliases={},
        unused=unused,
    )


def _load_metadata(path: Path) -> _Metadata:
    root = load_pickle(path.read_bytes(), source=path, permitted=torch_names())
    try:
        entries = cast("dict[str, Record]", root["state_dict_metadata"])
        tensors = {name: _described(entry) for name, entry in entries.items() if _is_tensor(entry)}
        return _Metadata(
            tensors=tensors,
            paths={name: tuple(map(str, keys)) for name, keys in (root["planner_data"] or {}).items()},
            places=dict(_places(root["storage_data"], path)),
            others=tuple(name for name in entries if name not in tensors),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"it lacks a field of PyTorch's metadata ({error!r})") from error


def _is_tensor(entry: Record) -> bool:
    return type(entry).__qualname__.endswith(".TensorStorageMetadata")


def _described(entry: Record) -> tuple[TensorSpec, list[tuple[Shape, Shape]]]:
    properties = entry["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    if not isinstance(dtype, Dtype) or dtype.name is None:
        raise ValueError(f"dtype {dtype!r}")
    chunks = [(_shape(chunk["offsets"]), _shape(chunk["sizes"])) for chunk in entry["chunks"]]
    return TensorSpec(dtype=dtype.name, shape=_shape(entry["size"])), chunks


def _places(storage: Mapping[Record, Record], path: Path) -> Iterator[tuple[tuple[str, Shape], _Place]]:
    for index, info in storage.items():
        file = str(info["relative_path"])
        if Path(file).name != file:
            raise ValueError(f"file {file!r}")
        if info.state.get("transform_descriptors"):
            raise CheckpointRefused(
                f"{path.parent} is compressed ({index['fqn']}).",
                remedy="Save it without extensions of torch.distributed.checkpoint's writer.",
            )
        offsets = index.state.get("offset")
        place = _Place(file=file, start=int(info["offset"]), length=int(info["length"]))
        yield (str(index["fqn"]), () if offsets is None else _shape(offsets)), place


def _shape(value: Any) -> Shape:
    if not isinstance(value, tuple) or not all(isinstance(number, int) for number in value):
        raise ValueError(f"shape {value!r}")
    return cast("Shape", value)


def _model_names(metadata: _Metadata, root: Path) -> tuple[dict[str, str], list[str]]:
    """Return flat name -> name in the model, and descriptions of what is not part of the model."""
    paths = {flat: metadata.paths.get(flat, (flat,)) for flat in metadata.tensors}
    below = {keys[0] for keys in paths.values() if len(keys) > 1}
    model = next((key for key in _MODEL_KEYS if key in below), None)
    if model is None and below and all(len(keys) > 1 for keys in paths.values()):
        raise CheckpointRefused(
            f"{root} holds no model; it holds {listed(sorted(below))}.",
            remedy="Pass the directory of the model (accelerate names it pytorch_model_fsdp_0).",
        )
    names = {
        flat: ".".join(keys[1:] if model else keys)
        for flat, keys in paths.items()
        if (keys[0] == model if model else len(keys) == 1)
    }
    rest = {keys[0] for flat, keys in paths.items() if flat not in names}
    return names, [*sorted(rest), *metadata.others]


def _tensor(root: Path, metadata: _Metadata, flat: str) -> LazyTensor:
    spec, described = metadata.tensors[flat]
    chunks = [_chunk(root, metadata, flat, offsets, shape) for offsets, shape in described]
    if obstacle := obstacle_of(spec, chunks):
        raise damaged(root, f"{flat}: {obstacle}")
    return assembled(spec, chunks)


def _chunk(root: Path, metadata: _Metadata, flat: str, offsets: Shape, shape: Shape) -> Chunk:
    place = metadata.places.get((flat, offsets))
    if place is None or not (root / place.file).is_file():
        raise CheckpointRefused(
            f"{root} lacks {place.file if place else f'the chunk of {flat} at {list(offsets)}'}, which its metadata"
            " names.",
            remedy="Copy the files of every rank (and of every machine) into one directory.",
        )
    view = open_torch_file(root / place.file, start=place.start, length=place.length)
    dtype = metadata.tensors[flat][0].dtype
    if not isinstance(view, StoredView) or view.spec != TensorSpec(dtype=dtype, shape=shape):
        raise damaged(root / place.file, f"the chunk of {flat} at {list(offsets)} is not {dtype} {list(shape)}")
    return Chunk(view, offsets)
