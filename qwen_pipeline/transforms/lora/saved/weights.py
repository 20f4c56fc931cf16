"""The tensors of an adapter under PEFT's names, from one file or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import StoredTensor
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.transforms.lora.saved.names import Spelling, spelling_of

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_INDEX = f"{ADAPTER_WEIGHTS}.index.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights:
    """The tensors of an adapter.

    Attributes:
        files: The files, in the order of their names; the index, if there is one, is not among them.
        spelling: PEFT's names of the tensors.
        stored: PEFT's name -> its place in a file.
    """

    files: Sequence[SafetensorsFile]
    spelling: Spelling
    stored: Mapping[str, StoredTensor]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """PEFT's name -> dtype and shape."""
        return {name: tensor.file.specs[tensor.name] for name, tensor in self.stored.items()}

    def load(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """See :meth:`SafetensorsFile.load`."""
        return self.stored[name].file.load(self.stored[name].name, start, stop)

    def load_columns(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """See :meth:`SafetensorsFile.load_columns`."""
        return self.stored[name].file.load_columns(self.stored[name].name, start, stop)


def open_weights(root: Path) -> AdapterWeights | None:
    """Open the tensors of an adapter's directory: one file, or shards with an index; None if it has neither.

    Raises:
        AdapterRefused: There is one file and an index, the index does not agree with the shards, or a tensor is empty,
            as a rank of a sharded training saves it.
        CheckpointRefused: A file is damaged.
    """
    paths = _paths(root)
    if not paths:
        return None
    files = [open_safetensors(path) for path in paths]
    owners = {name: file for file in files for name in file.specs}
    if empty := [name for name, file in owners.items() if 0 in file.specs[name].shape]:
        raise AdapterRefused(
            f"{root} has tensors without values: {listed(empty)}. A rank of a sharded training (ZeRO-3, FSDP) saved the"
            " part that it held.",
            remedy=f"Gather the weights, if the training's own checkpoint (global_step*/, *.distcp) is there too:"
            f" qwen-pipeline convert --from {quote(str(root))} --out CONVERTED. Otherwise save again with all weights"
            " gathered (stage3_gather_16bit_weights_on_model_save in DeepSpeed's config).",
        )
    spelling = spelling_of(owners, source=root)
    stored = {name: StoredTensor(owners[saved], saved) for name, saved in spelling.names.items()}
    return AdapterWeights(files=files, spelling=spelling, stored=stored)


def weight_files(root: Path) -> list[str]:
    """Return the names of the files that hold an adapter's tensors, with the index of shards; empty if there is none.

    Raises:
        AdapterRefused: See :func:`open_weights`.
    """
    index = [ADAPTER_INDEX] if (root / ADAPTER_INDEX).is_file() else []
    return [*(path.name for path in _paths(root)), *index]


def _paths(root: Path) -> list[Path]:
    single, index = root / ADAPTER_WEIGHTS, root / ADAPTER_INDEX
    if not index.is_file():
        return [single] if single.is_file() else []
    if single.is_file():
        raise AdapterRefused(
            f"{root} has both {ADAPTER_WEIGHTS} and {ADAPTER_INDEX}: it is unclear which of them was trained last.",
            remedy="Remove the outdated one.",
        )
    owners = load_json(index, refused=AdapterRefused).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise AdapterRefused(f"{index} has no weight_map.", remedy="Save the adapter again.")
    names = sorted({str(file) for file in owners.values()})
    if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise AdapterRefused(
            f"{index} names {listed(wrong)}; expected plain *.safetensors file names.",
            remedy="Put the shards into the directory of the index.",
        )
    if missing := [name for name in names if not (root / name).is_file()]:
        raise AdapterRefused(
            f"{root} lacks {listed(missing)}, which its index names.",
            remedy="Wait until the upload is complete, or download them again.",
        )
    _require_agreement(index, {str(name): str(file) for name, file in owners.items()}, [root / name for name in names])
    return [root / name for name in names]


def _require_agreement(index: Path, owners: Mapping[str, str], paths: Sequence[Path]) -> None:
    found = [(name, path.name) for path in paths for name in open_safetensors(path).specs]
    if sorted(found) != sorted(owners.items()):
        different = sorted({name for name, _ in {*found} ^ {*owners.items()}} or {name for name, _ in found})
        raise AdapterRefused(
            f"{index} does not agree with its shards: {listed(different)}.",
            remedy="The files belong to two saves, or one is incomplete: fetch them again.",
        )
