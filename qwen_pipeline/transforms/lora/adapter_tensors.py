"""The role of each tensor of an adapter by its name in PEFT's files, independent of any base.

PEFT names a tensor ``base_model.model.<module>.<part>``. Wrapped parameters of one module are nested, the first
parameter innermost: ``experts.base_layer.lora_A`` belongs to ``gate_up_proj``, ``experts.lora_A`` to ``down_proj``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen_pipeline.transforms.lora.settings import INPUT_EMBEDDING, OUTPUT_HEAD, LoraSettings

_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_LORA_BIAS = "lora_B.bias"
_TOKENS = "token_adapter.trainable_tokens_delta"
_COPIES = ("base_layer.weight", "token_adapter.base_layer.weight")
"""A copy of the frozen weight, which PEFT saves for an embedding or ``lm_head`` that is a target or was resized."""
_BASE_BIAS = "base_layer.bias"
_PARTS = (*_LINEAR, *_EMBEDDING, *_MAGNITUDES, _LORA_BIAS, _TOKENS, *_COPIES, _BASE_BIAS)
_REPEATED = re.compile(r"(.+?)\.(?:(modules_to_save)|original_module)\.(.+)")
"""A duplicate of a saved weight, or its original: PEFT saves both for a resized vocabulary and for trained biases."""
_NAME = re.compile(
    rf"base_model\.model\.(?:(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})|(?P<whole>.+))"
)

_STACKS = ("gate_up_proj", "down_proj")
"""The parameters of a module ``experts``, in the order of registration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The names of the tensors of one low-rank update, which is ``up @ down``.

    Attributes:
        parameter: Path of the updated parameter in the trained model, such as ``model.layers.0.mlp.up_proj.weight``.
        layout: ``linear``: ``up`` = B ``[O, R]``, ``down`` = A ``[R, I]``; with further axes for a convolution.
            ``embedding``: ``up`` = A ``[R, O]``, ``down`` = B ``[I, R]``, where O is the vocabulary. ``experts``:
            ``up`` = B ``[O, R x E]``, experts innermost; ``down`` = A ``[E x R, I]``, experts outermost. ``swapped
            experts``: the transposed matrices were trained, so ``up`` = A ``[E x R, O]``, ``down`` = B ``[I, R x E]``.
        pattern_key: The path that rank and alpha patterns are matched against.
        bias: The tensor that, times the scaling, is added to the module's bias.
        magnitude: DoRA's norms.
        grouped_by_expert: Whether the columns of an expert in B are consecutive, instead of one for each rank.
    """

    parameter: str
    layout: Literal["linear", "embedding", "experts", "swapped experts"]
    pattern_key: str
    up: str
    down: str
    bias: str | None = None
    magnitude: str | None = None
    grouped_by_expert: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.up, self.down, self.bias, self.magnitude) if name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTensors:
    """The tensors of an adapter by role; every tensor has exactly one.

    Attributes:
        factors: Parameter path -> its low-rank update.
        tokens: Module path -> tensor that replaces the rows ``trainable_token_indices`` of the module's weight.
        saved: Parameter path -> tensor that replaces it: biases, saved modules, a resized vocabulary.
        copies: Module path -> copies of its frozen weight.
        duplicates: Tensor that duplicates a saved one -> the parameter's path.
        originals: Tensor that holds the value of a saved one before training -> the parameter's path.
        without_role: Tensors without a role.
    """

    factors: dict[str, Factors] = field(default_factory=dict[str, Factors])
    tokens: dict[str, str] = field(default_factory=dict[str, str])
    saved: dict[str, str] = field(default_factory=dict[str, str])
    copies: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    duplicates: dict[str, str] = field(default_factory=dict[str, str])
    originals: dict[str, str] = field(default_factory=dict[str, str])
    without_role: list[str] = field(default_factory=list[str])


def classify_tensors(names: Iterable[str], settings: LoraSettings) -> AdapterTensors:
    """Return the role of each tensor, which follows from its name and the settings."""
    tensors = AdapterTensors()
    modules: dict[str, dict[str, str]] = {}
    repeated: dict[str, re.Match[str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if not match:
            tensors.without_role.append(name)
        elif not (whole := match["whole"]):
            modules.setdefault(match["module"], {})[match["part"]] = name
        elif repeated_match := _REPEATED.fullmatch(whole):
            repeated[name] = repeated_match
        else:
            _add_saved(tensors, whole, name)
    for module, parts in sorted(modules.items()):
        _classify_module(tensors, module, parts, settings)
    for name, match in repeated.items():
        _classify_repeated(tensors, name, match)
    tensors.without_role.extend(_not_in_settings(tensors, settings))
    return tensors


def _classify_module(tensors: AdapterTensors, module: str, parts: dict[str, str], settings: LoraSettings) -> None:
    if _BASE_BIAS in parts:
        _add_saved(tensors, f"{module}.bias", parts.pop(_BASE_BIAS))
    if copies := [parts.pop(part) for part in _COPIES if part in parts]:
        tensors.copies[module] = copies
    if _TOKENS in parts:
        tensors.tokens[module] = parts.pop(_TOKENS)
    if factors := _factors(module, parts, settings):
        tensors.factors[factors.parameter] = factors
    else:
        tensors.without_role.extend(parts.values())


def _factors(module: str, parts: Mapping[str, str], settings: LoraSettings) -> Factors | None:
    """Return a module's update if its tensors are complete: one pair of factors, and all that the settings add."""
    optional = [part for part in (*_MAGNITUDES, _LORA_BIAS) if part in parts]
    pair = tuple(sorted(parts.keys() - set(optional)))
    path = _parameter(module, settings)
    if pair not in (_LINEAR, _EMBEDDING) or path is None:
        return None
    magnitude = [parts[part] for part in _MAGNITUDES if part in parts]
    if len(magnitude) != settings.use_dora or (_LORA_BIAS in parts) != (settings.lora_bias and pair == _LINEAR):
        return None
    parameter, pattern_key = path
    down, up = pair if pair == _LINEAR else reversed(pair)
    return Factors(
        parameter=parameter,
        layout="embedding" if pair == _EMBEDDING else "experts" if _leaf(parameter) in _STACKS else "linear",
        pattern_key=pattern_key,
        up=parts[up],
        down=parts[down],
        bias=parts.get(_LORA_BIAS),
        magnitude=magnitude[0] if magnitude else None,
    )


def _parameter(module: str, settings: LoraSettings) -> tuple[str, str] | None:
    """Return the path of the parameter that factors in ``module`` update, and the path for matching patterns."""
    owner, depth = module, 0
    while owner.endswith(".base_layer"):
        owner, depth = owner.removesuffix(".base_layer"), depth + 1
    names = _STACKS if _leaf(owner) == "experts" else ("weight",)
    targets = [path for name in names if settings.targets_parameter(path := f"{owner}.{name}")]
    if not targets and not depth:
        return f"{module}.weight", module
    if depth >= len(targets):
        return None
    path = targets[-1 - depth]
    return path, path


def _add_saved(tensors: AdapterTensors, path: str, name: str) -> None:
    if path in tensors.saved:
        tensors.without_role.append(name)
    tensors.saved[path] = name


def _classify_repeated(tensors: AdapterTensors, name: str, match: re.Match[str]) -> None:
    """Find the saved weight that a tensor repeats; the adapter's name may precede that of the parameter."""
    module, is_duplicate, inner = match.groups()
    paths = [f"{module}.{inner}", f"{module}.{inner.partition('.')[2]}"]
    path = next((path for path in paths if path in tensors.saved), None)
    if path is None:
        tensors.without_role.append(name)
    elif is_duplicate:
        tensors.duplicates[name] = path
    else:
        tensors.originals[name] = path


def _not_in_settings(tensors: AdapterTensors, settings: LoraSettings) -> Iterator[str]:
    """Yield the tensors that PEFT does not save with these settings, or only with another one, which is missing."""
    updated = {factors.parameter.removesuffix(".weight") for factors in tensors.factors.values()}
    for path, name in tensors.saved.items():
        module, _, parameter = path.rpartition(".")
        is_bias = parameter == "bias" and (
            settings.bias == "all" or (settings.bias == "lora_only" and module in updated)
        )
        if not is_bias and not settings.saves(module) and _leaf(module) not in (INPUT_EMBEDDING, OUTPUT_HEAD):
            yield name
    for module, name in tensors.tokens.items():
        if not settings.tokens_of(module) or module in updated:
            yield name
    for module, names in tensors.copies.items():
        if module not in updated | tensors.tokens.keys():
            yield from names


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
