"""A PEFT LoRA as saved on disk: its settings, and the pair of low-rank factors of each module. Headers only.

What this version cannot merge exactly is refused by name, also settings that it has never heard of: an adapter is
merged completely or not at all.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.lazy import PICKLES, open_sidecars
from qwen_pipeline.checkpoint.manifest import canonical_sha256
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from qwen_pipeline.errors import AdapterRefused, listed

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base as it was."""

_MERGED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
_TRAINING_ONLY = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
"""Fields that chose what was trained and how; the saved tensors already show the outcome."""

_TO_PLAIN_LORA = "Convert the adapter to plain LoRA where it was trained"
_MERGE_WITH_PEFT = (
    "Merge it with PEFT (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and hand in the result"
    " as a full fine-tune."
)
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the columns of the merged weight",
    "modules_to_save": "whole modules were trained beside the low-rank factors",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "it updates fused parameters, as of experts",
    "bias": "biases of the base were trained",
    "lora_bias": "its factors carry biases",
    "fan_in_fan_out": "it is meant for transposed weights, which Qwen models do not have",
    "ensure_weight_tying": "it ties factors of the embedding and of lm_head",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only, which no merged weight can",
    "megatron_config": "its modules are sharded by Megatron",
    "use_qalora": "QA-LoRA pools the inputs of its factors",
    "layer_replication": "the model it was trained on repeats layers",
    "use_bdlora": "its factors are block diagonal",
    "arrow_config": "Arrow routes each token to other factors",
    "kasa_config": "KaSA truncated the base and puts a diagonal between the factors",
    "velora_config": "VeLoRA is not verified here",
    "monteclora_config": "MonteCLoRA samples its factors",
}
_INERT: tuple[object, ...] = (None, False, "none", [], {})

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings that decide what the factors of a module amount to."""

    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: Mapping[str, PositiveInt] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, FiniteFloat] = field(default_factory=dict[str, float])

    def rank(self, module: str) -> int:
        """Return the rank of a module; the first pattern that matches decides."""
        return _resolve(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return ``alpha / r``, or with rsLoRA ``alpha / sqrt(r)`` (arXiv:2312.03732)."""
        alpha, rank = _resolve(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


_LORA_SETTINGS = TypeAdapter(LoraSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The two tensors of one module: ``A`` is ``[R, I]`` and ``B`` is ``[O, R]``; names as in the file."""

    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter whose every tensor is one factor of exactly one module.

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

    def spec(self, tensor: str) -> TensorSpec:
        return self.weights.specs[tensor]

    def load(self, tensor: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Return rows of a factor as stored."""
        return self.weights.load(tensor, start, stop)

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over the adapter's weights, settings and sidecars, which are read once."""
        files = {name: self.root / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)} | self.sidecars
        return "sha256:" + canonical_sha256({path: file.sha256 for path, file in digest_files(files).items()})


def is_adapter(root: Path) -> bool:
    return (root / ADAPTER_CONFIG).is_file()


def open_adapter(root: Path) -> Adapter:
    """Open a directory that PEFT's ``save_pretrained`` wrote.

    Raises:
        AdapterRefused: Its weights are pickled or missing, a setting is not supported or not known, or a tensor is not
            half of a complete pair of factors of the configured rank.
    """
    config = _load_config(root)
    settings = _settings(root, config)
    if not (root / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(root)
    weights = open_safetensors(root / ADAPTER_WEIGHTS)
    modules = _pair_factors(root, weights)
    _require_ranks(root, weights, modules, settings)
    return Adapter(root=root, config=config, settings=settings, weights=weights, modules=modules)


def require_finite_factors(adapter: Adapter) -> None:
    """Read every factor once and refuse an adapter with a NaN or an infinity in it.

    Raises:
        AdapterRefused: Naming the tensors.
    """
    if broken := [name for name in adapter.weights.specs if not adapter.load(name).isfinite().all()]:
        raise AdapterRefused(
            f"{adapter.root} has values that are not finite in {listed(broken)}.",
            remedy="The training diverged: use an earlier checkpoint of the adapter.",
        )


def _resolve(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the whole path or its end after a dot (PEFT's rule)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


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


def _settings(root: Path, config: Mapping[str, Any]) -> LoraSettings:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterRefused(f"{root} is of PEFT type {kind!r}; only LORA is supported.", remedy=_MERGE_WITH_PEFT)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise AdapterRefused(
            f"{root} was initialised with init_lora_weights={init!r}, which changed the base's own weights.",
            remedy=_TO_PLAIN_LORA + ": save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for name, value in config.items():
        if name in _MERGED or name in _TRAINING_ONLY or value in _INERT:
            continue
        if reason := _UNSUPPORTED.get(name):
            raise AdapterRefused(f"{root} has {name}={value!r}: {reason}.", remedy=_MERGE_WITH_PEFT)
        raise AdapterRefused(
            f"{root} has {name}={value!r}, a setting that this version does not know.",
            remedy=f"If it only steered the training, remove it from {ADAPTER_CONFIG}. Otherwise: {_MERGE_WITH_PEFT}",
        )
    return _numbers(root, config)


def _numbers(root: Path, config: Mapping[str, Any]) -> LoraSettings:
    fields = {name: config[name] for name in LoraSettings.__dataclass_fields__ if config.get(name) is not None}
    try:
        settings = _LORA_SETTINGS.validate_python(fields)
        for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
            re.compile(pattern)
    except (ValueError, re.error) as error:
        raise AdapterRefused(
            f"The numbers or patterns of {root / ADAPTER_CONFIG} are damaged: {error}.",
            remedy="Save the adapter again.",
        ) from error
    return settings


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


def _pair_factors(root: Path, weights: SafetensorsFile) -> dict[str, Factors]:
    pairs: dict[str, dict[str, str]] = {}
    stray: list[str] = []
    for name in weights.specs:
        if match := re.fullmatch(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight", name):
            pairs.setdefault(match["module"], {})[match["factor"]] = name
        else:
            stray.append(name)
    stray += [name for pair in pairs.values() if len(pair) < 2 for name in pair.values()]
    if stray or not pairs:
        raise AdapterRefused(
            f"{root} has tensors that are not one of a pair lora_A, lora_B: {listed(stray) or 'no tensors at all'}.",
            remedy=f"If the adapter holds more than LoRA factors: {_MERGE_WITH_PEFT} Otherwise save it again.",
        )
    return {module: Factors(a=pair["A"], b=pair["B"]) for module, pair in sorted(pairs.items())}


def _require_ranks(
    root: Path, weights: SafetensorsFile, modules: Mapping[str, Factors], settings: LoraSettings
) -> None:
    wrong: list[str] = []
    for module, factors in modules.items():
        a, b, rank = weights.specs[factors.a], weights.specs[factors.b], settings.rank(module)
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            wrong.append(f"{factors.a} {list(a.shape)} and {factors.b} {list(b.shape)} (expected rank {rank})")
    if wrong:
        raise AdapterRefused(
            f"{root} has factors of other shapes than its settings say: {listed(wrong)}.",
            remedy="Use the adapter_config.json that was saved with these weights; gather sharded weights when saving.",
        )
