"""Checkpoints whose names, dtypes and shapes are known at once, and whose bytes are read on request, by rows.

Transformations build a new :class:`Checkpoint` from an old one (:meth:`Checkpoint.replace`), so that merge and pad
compose, and every shape is checked before any tensor is read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.config_types import load_config_file
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from qwen_pipeline.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
STEM = "model"
_MAX_NAME = 255
INDEX = f"{STEM}.safetensors.index.json"
SINGLE_SHARD = f"{STEM}.safetensors"
MANIFEST = "manifest.json"

SIDECARS = (
    "generation_config.json", "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "spk_dict.pt", "LICENSE*", "NOTICE*", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "[0-9]*_*/config.json",
)  # fmt: skip
"""Files that describe how a model is used rather than what it computes. Every stage copies them unchanged.

Those of sentence-transformers list the steps after the model, each in a directory such as ``1_Pooling``.

``spk_dict.pt`` holds the voices of Qwen2.5-Omni, without which Transformers does not load it; it is never opened here.
"""

MAX_SIDECAR_BYTES = 1_000_000_000
_STEPS, _STEP_WEIGHTS = "modules.json", "[0-9]*_*/model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

ReadRows = Callable[[int, int], "torch.Tensor"]
"""``read(start, stop)`` returns rows ``start:stop``, shape ``[stop - start, *shape[1:]]``, in the spec's dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor of a file, by name."""

    file: SafetensorsFile
    name: str

    def load(self, start: int, stop: int) -> "torch.Tensor":
        """Return elements ``start:stop`` of the flattened tensor."""
        return self.file.load_elements(self.name, start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor that is read or computed on request.

    Attributes:
        spec: Its dtype and shape.
        read: Returns rows. A row has the same bytes regardless of the block it is read in. The caller may keep the
            memory, but must not change it.
        stored: The stored tensor that it is identical to; None if it is computed.
    """

    spec: TensorSpec
    read: ReadRows
    stored: StoredTensor | None = None

    def part(self, start: int, stop: int) -> "LazyTensor":
        """Return rows ``start:stop``, as far as the tensor has them."""
        start, stop = min(start, self.spec.rows), min(stop, self.spec.rows)
        spec = TensorSpec(dtype=self.spec.dtype, shape=(stop - start, *self.spec.shape[1:]))
        return LazyTensor(spec=spec, read=lambda first, last: self.read(start + first, start + last))


def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Return the rows of several tensors of one dtype and one shape of rows, one tensor after the other."""
    ends = list(accumulate(part.spec.rows for part in parts))
    spec = TensorSpec(dtype=parts[0].spec.dtype, shape=(ends[-1], *parts[0].spec.shape[1:]))

    def read(start: int, stop: int) -> "torch.Tensor":
        import torch

        bounds = [(max(start, end - part.spec.rows), min(stop, end)) for part, end in zip(parts, ends, strict=True)]
        blocks = [
            part.read(low - end + part.spec.rows, high - end + part.spec.rows)
            for part, end, (low, high) in zip(parts, ends, bounds, strict=True)
            if low < high
        ]
        return torch.cat(blocks) if blocks else parts[0].read(0, 0)

    return LazyTensor(spec=spec, read=read)


def stored_tensor(file: SafetensorsFile, name: str) -> LazyTensor:
    """Return a tensor of a file, to be read on request."""
    return LazyTensor(
        spec=file.specs[name],
        read=lambda start, stop: file.load(name, start, stop),
        stored=StoredTensor(file, name),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint(Mapping[str, TensorSpec]):
    """A mapping of tensor names to specs, with the config, the shard of each tensor, and the other files.

    Attributes:
        config: The parsed ``config.json``.
        config_bytes: The file that it was parsed from, to be copied unchanged; None once the config was changed.
        tensors: Every tensor in the order of its bytes on disk.
        shards: Tensor name -> file name of its shard.
        sidecars: Relative path -> file that is copied unchanged (:data:`SIDECARS`).
        left_behind: Relative paths of the source directory's files that are not copied.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    shards: Mapping[str, str]
    config_bytes: bytes | None = None
    sidecars: Mapping[str, Path] = field(default_factory=dict[str, Path])
    left_behind: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> TensorSpec:
        return self.tensors[name].spec

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.values())

    def load(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """Return a tensor, or only its ``rows`` (a slice of the first axis with step 1)."""
        tensor = self.tensors[name]
        start, stop, step = (rows or slice(None)).indices(tensor.spec.rows)
        if step != 1:
            raise ValueError(f"rows must be contiguous, got {rows}")
        return tensor.read(start, max(start, stop))

    def replace(
        self,
        *,
        tensors: Mapping[str, LazyTensor] | None = None,
        config: Mapping[str, Any] | None = None,
        sidecars: Mapping[str, Path] | None = None,
    ) -> "Checkpoint":
        """Return this checkpoint with some tensors, the whole config or all sidecars replaced.

        Raises:
            KeyError: A tensor is not in this checkpoint; :meth:`with_tensor` adds one.
        """
        changed = tensors or {}
        if unknown := changed.keys() - self.tensors.keys():
            raise KeyError(f"not in the checkpoint: {', '.join(sorted(unknown))}")
        return Checkpoint(
            config=self.config if config is None else config,
            tensors={name: changed.get(name, tensor) for name, tensor in self.tensors.items()},
            shards=self.shards,
            config_bytes=self.config_bytes if config is None else None,
            sidecars=self.sidecars if sidecars is None else sidecars,
            left_behind=self.left_behind,
        )

    def without(self, names: Collection[str]) -> "Checkpoint":
        """Return this checkpoint without some of its tensors."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return replace(self, tensors=kept, shards={name: self.shards[name] for name in kept})

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """Return this checkpoint with other names of its tensors, name -> new name, in the same shards."""
        return replace(
            self,
            tensors={names[name]: tensor for name, tensor in self.tensors.items()},
            shards={names[name]: shard for name, shard in self.shards.items()},
        )

    def with_tensor(self, name: str, tensor: LazyTensor, *, after: str) -> "Checkpoint":
        """Return this checkpoint with one more tensor, right after the tensor ``after`` and in the same shard.

        Raises:
            KeyError: There is no tensor ``after``, or there is a tensor ``name`` already.
        """
        if after not in self.tensors or name in self.tensors:
            raise KeyError(f"{name} cannot be added after {after}")
        tensors: dict[str, LazyTensor] = {}
        for existing_name, existing in self.tensors.items():
            tensors[existing_name] = existing
            if existing_name == after:
                tensors[name] = tensor
        return replace(self, tensors=tensors, shards={**self.shards, name: self.shards[after]})


def open_checkpoint(root: Path, *, stem: str = STEM) -> Checkpoint:
    """Open a Hugging Face model directory, one ``model.safetensors`` or shards with an index, and read its headers.

    Args:
        root: The directory.
        stem: The beginning of the weights' file names, if not ``model``.

    Raises:
        CheckpointRefused: The path is not a directory, it has no config or only pickled weights, a shard is outside of
            it, or its index does not agree with the shards.
    """
    if not root.is_dir():
        raise _no_directory(root)
    config = load_config_file(root / CONFIG)
    shards = _open_shards(root, stem)
    tensors: dict[str, LazyTensor] = {}
    owners: dict[str, str] = {}
    for shard in shards:
        for name in shard.specs:
            if name in owners:
                raise CheckpointRefused(
                    f"Tensor {name!r} is in both {owners[name]} and {shard.path.name} of {root}.",
                    remedy="Save the checkpoint again so that each tensor is in one shard.",
                )
            owners[name] = shard.path.name
            tensors[name] = stored_tensor(shard, name)
    sidecars = open_sidecars(root)
    known = {CONFIG, INDEX, MANIFEST, *owners.values(), *sidecars}
    return Checkpoint(
        config=config,
        tensors=tensors,
        shards=owners,
        config_bytes=(root / CONFIG).read_bytes(),
        sidecars=sidecars,
        left_behind=tuple(path for path in relative_files(root) if path not in known),
    )


def _no_directory(root: Path) -> CheckpointRefused:
    if root.exists():
        remedy = f"Pass the directory that holds the file: {quote(str(root.parent))}. If it is an archive, unpack it."
        return CheckpointRefused(f"{root} is a file, not a directory.", remedy=remedy)
    return CheckpointRefused(f"{root} does not exist.", remedy="Correct the path: pass a Hugging Face model directory.")


def open_sidecars(root: Path) -> dict[str, Path]:
    """Return a directory's files that match :data:`SIDECARS`: relative path -> absolute path.

    Steps of sentence-transformers may have weights, which belong to them if the directory lists its steps.

    Raises:
        CheckpointRefused: A file is far larger than such a file is; they are read as a whole.
    """
    paths = relative_files(root)
    globs = (*SIDECARS, _STEP_WEIGHTS) if _STEPS in paths else SIDECARS
    found = {path: root / path for path in paths if any(fnmatch(path, glob) for glob in globs)}
    for file in found.values():
        if (size := file.stat().st_size) > MAX_SIDECAR_BYTES:
            raise CheckpointRefused(
                f"{file} has {size:,} bytes, but a file beside the weights has at most {MAX_SIDECAR_BYTES:,}.",
                remedy="Remove it, or fetch it again.",
            )
    return found


def _open_shards(root: Path, stem: str) -> list[SafetensorsFile]:
    index_path, single = (root / name.replace(STEM, stem, 1) for name in (INDEX, SINGLE_SHARD))
    if single.exists() and not index_path.exists():
        return [open_safetensors(single)]
    if not index_path.exists():
        raise _no_weights(root)
    owners = _owners(index_path)
    if single.exists() and {*owners.values()} != {single.name}:
        raise CheckpointRefused(
            f"{root} has both {SINGLE_SHARD} and {INDEX}; loaders disagree about which of them to read.",
            remedy="Remove the outdated one.",
        )
    shards = [open_safetensors(_shard_path(root, file)) for file in sorted(set(owners.values()))]
    found = {name: shard.path.name for shard in shards for name in shard.specs}
    if wrong := sorted(name for name in owners.keys() | found.keys() if owners.get(name) != found.get(name)):
        shown = "; ".join(f"{n!r}: index {owners.get(n)}, found in {found.get(n)}" for n in wrong[:5])
        raise CheckpointRefused(
            f"{INDEX} of {root} does not agree with its shards for {len(wrong)} tensors: {shown}.",
            remedy="The upload or download is incomplete, or mixes the files of two saves: fetch it again.",
        )
    return shards


def _owners(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index states it."""
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointRefused(f"{index} has no weight_map.", remedy="Save the checkpoint again.")
    return {str(name): str(file) for name, file in cast("dict[Any, Any]", weight_map).items()}


def _shard_path(root: Path, file: str) -> Path:
    if Path(file).name != file or not file.endswith(".safetensors") or len(file) > _MAX_NAME or not file.isprintable():
        raise CheckpointRefused(
            f"{INDEX} of {root} names the shard {ascii(file)[:120]}, which is not a plain *.safetensors file name.",
            remedy="Use a checkpoint whose shards are in the same directory as its index.",
        )
    path = root / file
    if not path.is_file():
        raise CheckpointRefused(f"Shard {path} is missing.", remedy="Fetch the missing shard, then run again.")
    return path


def _no_weights(root: Path) -> CheckpointRefused:
    pickles = [path for path in relative_files(root) if any(fnmatch(path, glob) for glob in PICKLES)]
    if pickles:
        return CheckpointRefused(
            f"{root} holds pickled weights ({', '.join(pickles[:3])}), which can run code when loaded.",
            remedy=f"Convert them, which runs nothing: qwen-pipeline convert --from {quote(str(root))} --out DIRECTORY",
        )
    return CheckpointRefused(
        f"{root} holds neither {SINGLE_SHARD} nor {INDEX}.", remedy="Pass a directory with safetensors weights."
    )


def relative_files(root: Path) -> list[str]:
    """Return the sorted files below ``root`` without hidden ones; links, as in the hub's cache, are followed.

    Raises:
        CheckpointRefused: An entry is neither a file nor a directory, such as a FIFO or a link to nothing.
    """
    files: list[str] = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_file():
            files.append(relative.as_posix())
        elif not path.is_dir():
            raise CheckpointRefused(
                f"{path} is neither a regular file nor a directory.",
                remedy="Remove it, or put the file itself in its place.",
            )
    return sorted(files)
