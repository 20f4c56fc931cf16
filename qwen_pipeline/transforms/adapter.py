"""A PEFT LoRA as saved on disk: its settings, and the pair of low-rank factors of each module. Headers only.

What this version cannot merge exactly is refused by name, also settings that it has never heard of: an adapter is
merged completely or not at all.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.digest import directory_digest
from qwen_pipeline.checkpoint.finite import is_finite
from qwen_pipeline.checkpoint.lazy import PICKLES, open_sidecars
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, open_safetensors
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.transforms.lora_settings import MERGE_WITH_PEFT, LoraSettings, lora_settings

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_COPY = "base_layer.weight"
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The tensors of one module, by their names in the file; its update is ``up @ down``.

    A linear layer's are ``up`` = B ``[O, R]`` and ``down`` = A ``[R, I]``. An embedding's are stored transposed:
    ``up`` = A ``[R, O]``, ``down`` = B ``[I, R]``, with the vocabulary as O.

    Attributes:
        copy: The module's frozen base weight, which PEFT saves along when an embedding or ``lm_head`` is a target.
    """

    up: str
    down: str
    transposed: bool
    copy: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter whose every tensor belongs to exactly one module.

    Attributes:
        config: The parsed ``adapter_config.json``.
        modules: Module path in the model, such as ``model.layers.0.mlp.up_proj`` -> its factors.
    """

    root: Path
    config: Mapping[str, Any]
    settings: LoraSettings
    weights: SafetensorsFile
    modules: Mapping[str, Factors]

    @property
    def base_name(self) -> str | None:
        """The base it was trained on, as its trainer called it."""
        return self.config.get("base_model_name_or_path")

    @property
    def sidecars(self) -> dict[str, Path]:
        return open_sidecars(self.root)

    def update_shape(self, module: str) -> tuple[int, int]:
        """Return the shape ``[O, I]`` of a module's update."""
        factors, specs = self.modules[module], self.weights.specs
        o, i = (1, 0) if factors.transposed else (0, 1)
        return specs[factors.up].shape[o], specs[factors.down].shape[i]

    def load_up(self, module: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop`` of the factor ``[O, R]``."""
        factors = self.modules[module]
        if factors.transposed:
            return self.weights.load(factors.up)[:, start:stop].T
        return self.weights.load(factors.up, start, stop)

    def load_down(self, module: str) -> "torch.Tensor":
        """Return the factor ``[R, I]``."""
        factors = self.modules[module]
        down = self.weights.load(factors.down)
        return down.T if factors.transposed else down

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over the adapter's weights, settings and sidecars."""
        files = {name: self.root / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)} | self.sidecars
        return directory_digest(files)


def is_adapter(root: Path) -> bool:
    return (root / ADAPTER_CONFIG).is_file()


def open_adapter(root: Path) -> Adapter:
    """Open a directory that PEFT's ``save_pretrained`` wrote.

    Raises:
        AdapterRefused: Its weights are pickled or missing, a setting is not supported or not known, or a tensor is not
            half of a complete pair of factors of the configured rank.
    """
    config = _load_config(root)
    settings = lora_settings(config, source=root / ADAPTER_CONFIG)
    if not (root / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(root)
    weights = open_safetensors(root / ADAPTER_WEIGHTS)
    modules = _group_factors(root, weights)
    _require_ranks(root, weights, modules, settings)
    return Adapter(root=root, config=config, settings=settings, weights=weights, modules=modules)


def require_finite_factors(adapter: Adapter) -> None:
    """Read every factor once and refuse an adapter with a NaN or an infinity in it.

    Raises:
        AdapterRefused: Naming the tensors.
    """
    if broken := [name for name in adapter.weights.specs if not is_finite(adapter.weights.load(name))]:
        raise AdapterRefused(
            f"{adapter.root} has values that are not finite in {listed(broken)}.",
            remedy="The training diverged: use an earlier checkpoint of the adapter.",
        )


def _load_config(root: Path) -> dict[str, Any]:
    try:
        config = json.loads((root / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterRefused(
            f"{root / ADAPTER_CONFIG} cannot be read: {error}.", remedy="Save or fetch the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise AdapterRefused(f"{root / ADAPTER_CONFIG} is not a JSON object.", remedy="Save the adapter again.")
    return cast("dict[str, Any]", config)


def _no_weights(root: Path) -> AdapterRefused:
    pickles = sorted(path.name for pattern in PICKLES for path in root.glob(pattern))
    if not pickles:
        return AdapterRefused(f"{root} has no {ADAPTER_WEIGHTS}.", remedy="Wait for the upload, or fetch it again.")
    convert = (
        "from safetensors.torch import save_file; import torch; "
        f"save_file(torch.load('{pickles[0]}', weights_only=True), '{ADAPTER_WEIGHTS}')"
    )
    return AdapterRefused(
        f"{root} holds pickled weights ({', '.join(pickles)}), which can run code when loaded.",
        remedy=f'Convert them where you trust them: python -c "{convert}"',
    )


def _group_factors(root: Path, weights: SafetensorsFile) -> dict[str, Factors]:
    groups: dict[str, dict[str, str]] = {}
    for name in weights.specs:
        match = _TENSOR.fullmatch(name)
        module, part = match.group("module", "part") if match else ("", name)
        groups.setdefault(module, {})[part] = name
    modules = {module: found for module, parts in sorted(groups.items()) if (found := _factors(parts))}
    stray = [name for module in groups.keys() - modules.keys() for name in groups[module].values()]
    if stray or not modules:
        raise AdapterRefused(
            f"{root} has tensors that are not one of a pair lora_A, lora_B: {listed(sorted(stray)) or 'none at all'}.",
            remedy=f"If the adapter holds more than LoRA factors: {MERGE_WITH_PEFT} Otherwise save it again.",
        )
    return modules


def _factors(parts: Mapping[str, str]) -> Factors | None:
    """Return a module's factors if its tensors are one complete pair, with or without a copy of the base weight."""
    match sorted(parts.keys() - {_COPY}):
        case ["lora_A.weight", "lora_B.weight"]:
            up, down, transposed = "lora_B.weight", "lora_A.weight", False
        case ["lora_embedding_A", "lora_embedding_B"]:
            up, down, transposed = "lora_embedding_A", "lora_embedding_B", True
        case _:
            return None
    return Factors(up=parts[up], down=parts[down], transposed=transposed, copy=parts.get(_COPY))


def _require_ranks(
    root: Path, weights: SafetensorsFile, modules: Mapping[str, Factors], settings: LoraSettings
) -> None:
    wrong: list[str] = []
    for module, factors in modules.items():
        up, down, rank = weights.specs[factors.up].shape, weights.specs[factors.down].shape, settings.rank(module)
        inner = (up[:1], down[-1:]) if factors.transposed else (up[-1:], down[:1])
        if len(up) != 2 or len(down) != 2 or inner != ((rank,), (rank,)):
            wrong.append(f"{factors.up} {list(up)} and {factors.down} {list(down)} (expected rank {rank})")
    if wrong:
        raise AdapterRefused(
            f"{root} has factors of other shapes than its settings say: {listed(wrong)}.",
            remedy="Use the adapter_config.json that was saved with these weights; gather sharded weights when saving.",
        )
