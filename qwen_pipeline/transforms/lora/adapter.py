"""A LoRA as PEFT saves it: its settings and the role of each tensor. Only headers are read.

Settings and tensors that cannot be merged exactly, unknown ones included, are refused with a message that names them:
an adapter is merged completely or not at all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

from qwen_pipeline.checkpoint.digest import block_ranges, is_finite
from qwen_pipeline.checkpoint.digest_cache import directory_digest
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import CONFIG, PICKLES, open_sidecars
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.transforms.lora.adapter_tensors import AdapterTensors, Factors, classify_tensors
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS, AdapterWeights, open_weights, weight_files
from qwen_pipeline.transforms.lora.settings import LoraSettings, lora_settings

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """An adapter whose settings are supported and whose tensors all have a role.

    Attributes:
        root: The adapter's directory.
        config: The parsed ``adapter_config.json``.
        settings: The settings that a merge depends on.
        weights: Its tensors, under PEFT's names.
        tensors: The role of each tensor.
    """

    root: Path
    config: Mapping[str, Any]
    settings: LoraSettings
    weights: AdapterWeights
    tensors: AdapterTensors

    @property
    def base_name(self) -> str | None:
        """The path or hub id of the base that it was trained on, as its config states it."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The revision of the base, if its config states one."""
        return self.config.get("revision")

    @property
    def sidecars(self) -> dict[str, Path]:
        return open_sidecars(self.root)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.specs[name].shape

    def scaling(self, factors: Factors) -> float:
        return self.settings.scaling(factors.pattern_key)

    def experts(self, factors: Factors) -> int:
        """Return the number of matrices of an update."""
        match factors.layout:
            case "experts":
                return self.shape(factors.down)[0] // self.rank(factors)
            case "swapped experts":
                return self.shape(factors.up)[0] // self.rank(factors)
            case _:
                return 1

    def update_shape(self, factors: Factors) -> tuple[int, ...]:
        """Return the shape of one matrix of an update: ``[O, I]``, or the kernel's shape of a convolution."""
        up, down = self.shape(factors.up), self.shape(factors.down)
        return (up[0], *down[1:]) if factors.layout in ("linear", "experts") else (up[1], down[0])

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over the adapter's weights, settings and sidecars."""
        files = {name: self.root / name for name in (ADAPTER_CONFIG, *weight_files(self.root))} | self.sidecars
        config = {CONFIG: self.root / CONFIG} if self.labels else {}
        return directory_digest(files | config)

    @property
    def labels(self) -> dict[str, Any]:
        """The config of the trained model, if it is beside an adapter with a ``score``: it names the labels."""
        has_score = "score.weight" in self.tensors.saved and (self.root / CONFIG).is_file()
        return load_json(self.root / CONFIG) if has_score else {}

    def rank(self, factors: Factors) -> int:
        """Return the rank of an update; of a stack of experts, the rank of each matrix."""
        return self.settings.rank(factors.pattern_key)

    def grouped_convolutions(self) -> Iterator[str]:
        """Yield the modules whose ``lora_B`` is a grouped convolution: each output depends on a part of the rank."""
        for factors in self.tensors.factors.values():
            if factors.layout == "linear" and len(self.shape(factors.down)) == len(up := self.shape(factors.up)) > 2:
                group_rank, rank = up[1], self.rank(factors)
                if group_rank < rank and rank % group_rank == 0:
                    yield factors.parameter.removesuffix(".weight")

    def wrong_shapes(self) -> Iterator[str]:
        """Yield the tensors whose shapes contradict each other or the settings, with the shapes, for a message."""
        for factors in self.tensors.factors.values():
            if not self._fits(factors):
                shapes = " and ".join(f"{name} {list(self.shape(name))}" for name in factors.names)
                yield f"{shapes} (expected rank {self.rank(factors)})"
        for module, name in self.tensors.tokens.items():
            rows = len(self.settings.tokens_of(module))
            if len(self.shape(name)) != 2 or self.shape(name)[0] != rows:
                yield f"{name} {list(self.shape(name))} (expected {rows} rows)"
        for name, path in (self.tensors.duplicates | self.tensors.originals).items():
            saved = self.tensors.saved[path]
            if self.shape(name) != self.shape(saved):
                yield f"{name} {list(self.shape(name))} (expected {list(self.shape(saved))}, the shape of {saved})"

    def _fits(self, factors: Factors) -> bool:
        up, down, rank = self.shape(factors.up), self.shape(factors.down), self.rank(factors)
        match factors.layout:
            case "linear":
                fits = len(down) >= 2 and up == (up[0], rank, *(1 for _ in down[2:])) and down[0] == rank
            case "embedding":
                fits = len(up) == len(down) == 2 and up[0] == down[1] == rank
            case _:
                fits = len(up) == len(down) == 2 and up[1] == down[0] and down[0] % rank == 0
        if not fits:
            return False
        outputs, inputs = self.update_shape(factors)[:2]
        norms = inputs if factors.layout == "embedding" else outputs
        return (not factors.magnitude or prod(self.shape(factors.magnitude)) == norms) and (
            not factors.bias or self.shape(factors.bias) == (outputs,)
        )


def is_adapter(root: Path) -> bool:
    return (root / ADAPTER_CONFIG).is_file()


def open_adapter(root: Path) -> Adapter:
    """Open a directory that PEFT's ``save_pretrained`` wrote.

    Raises:
        AdapterRefused: The weights are pickled or missing, a setting is unsupported or unknown, or a tensor has no role
            under these settings or a shape that contradicts them.
    """
    config = load_json(root / ADAPTER_CONFIG, refused=AdapterRefused)
    settings = lora_settings(config, source=root / ADAPTER_CONFIG)
    weights = open_weights(root)
    if weights is None:
        raise _no_weights(root)
    if not weights.specs:
        raise AdapterRefused(f"{root / ADAPTER_WEIGHTS} has no tensors.", remedy="Save the adapter again.")
    tensors = classify_tensors(weights.specs, settings)
    if tensors.without_role:
        raise AdapterRefused(
            f"{root} has tensors that its settings do not account for, or one tensor of a pair without the other: "
            f"{listed(sorted(tensors.without_role))}.",
            remedy="Use the adapter_config.json that was saved with these weights, or save the adapter again with"
            " PEFT's save_pretrained. PEFT's own merge is no way out: it ignores tensors that it does not expect.",
        )
    adapter = Adapter(root=root, config=config, settings=settings, weights=weights, tensors=tensors)
    if grouped := list(adapter.grouped_convolutions()):
        raise AdapterRefused(
            f"{root} updates grouped convolutions, whose kernels cannot hold the update: {listed(grouped)}.",
            remedy="Train again without them in target_modules; PEFT cannot merge them either.",
        )
    if wrong := list(adapter.wrong_shapes()):
        raise AdapterRefused(
            f"{root} has tensors whose shapes contradict its settings: {listed(wrong)}.",
            remedy="Use the adapter_config.json that was saved with these weights. If the training was sharded, gather"
            " the weights before saving.",
        )
    return adapter


def require_finite(adapter: Adapter) -> None:
    """Read every tensor once and require that all values are finite.

    Raises:
        AdapterRefused: A tensor has a NaN or an infinity; the message names the tensors.
    """
    broken = [
        name
        for name, spec in adapter.weights.specs.items()
        if not all(is_finite(adapter.weights.load(name, start, stop)) for start, stop in block_ranges(spec))
    ]
    if broken:
        raise AdapterRefused(
            f"{adapter.root} has NaN or infinite values in {listed(broken)}.",
            remedy="Use a checkpoint of the adapter from before the training diverged.",
        )


def _no_weights(root: Path) -> AdapterRefused:
    pickles = sorted(path.name for pattern in PICKLES for path in root.glob(pattern))
    if not pickles:
        return AdapterRefused(
            f"{root} has no {ADAPTER_WEIGHTS}.", remedy="Wait until the upload is complete, or download it again."
        )
    return AdapterRefused(
        f"{root} holds pickled weights ({', '.join(pickles)}), which can execute code when they are loaded.",
        remedy=f"Convert them, which runs nothing: qwen-pipeline convert --from {quote(str(root))} --out DIRECTORY",
    )
