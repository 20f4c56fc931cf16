"""The base that an adapter names, recognized by rules: quantized copies, mirrors, local paths, and patterns of users.

Trainers write the path or id of what they loaded, which is often a copy of the base: Unsloth's 4-bit mirror, a folder
of a cloud machine, a hub's cache. Such a copy is the base if its name is the base's after the rules of this module.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import DigestCache
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.models.padded import padded_model
from qwen_pipeline.qwen.families import config_values
from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.transforms.codes.base_weights import AS_STORED, BaseWeights
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet

BASE_MATCHES = CheckSpec(
    name="base_is_the_one_trained_on", description="The adapter names the base that it was merged into."
)
MIRRORS = ("unsloth", "mlx-community", "lmstudio-community", "modelscope", "redhatai", "neuralmagic")
"""Organizations that publish copies of Qwen models under the same names, in lower case."""
QUANTIZED: Mapping[str, str] = {
    "-unsloth-bnb-4bit": "in 4 bits by Unsloth",
    "-bnb-4bit": "in 4 bits by bitsandbytes",
    "-bnb-8bit": "in 8 bits by bitsandbytes",
    "-fp8-dynamic": "in FP8",
    "-fp8-block": "in FP8",
    "-fp8": "in FP8",
    "-nvfp4": "in NVFP4",
    "-gptq-int4": "in 4 bits by GPTQ",
    "-gptq-int8": "in 8 bits by GPTQ",
    "-awq-int4": "in 4 bits by AWQ",
    "-awq": "in 4 bits by AWQ",
    "-4bit": "in 4 bits by MLX",
    "-8bit": "in 8 bits by MLX",
}
"""Endings of the names of quantized copies, in lower case -> the way in which they are quantized."""
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_experts", "vocab_size")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_CACHED = re.compile(r"models--(.+?)--(.+)")
"""A model's folder in the cache of a hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBase:
    """A base model, with the names by which adapters may refer to it.

    Attributes:
        root: The directory.
        names: Every name of the base, or patterns with ``*``; if empty, the directory's name is compared.
        revision: The commit, tag or branch.
        weights: The way to read its weights.
    """

    root: Path
    names: Collection[str] = ()
    revision: str | None = None
    weights: BaseWeights = AS_STORED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Name:
    """A base's name by its parts, in lower case, and the rules that found them."""

    owner: str | None
    model: str
    rules: list[str] = field(default_factory=list[str])


def base_report(base: KnownBase, adapters: AdapterSet, *, is_padded_base: bool = False) -> CheckReport:
    """Report on :data:`BASE_MATCHES`.

    Args:
        base: The base that the adapters are merged into.
        adapters: The adapters.
        is_padded_base: Whether they were trained on a checkpoint that was padded from this base.
    """
    unnamed = [] if is_padded_base else [each for each in adapters.adapters if not _is_named(each, base)]
    copies = {each: rule for each in unnamed if (rule := copy_rule(each.base_name, base))}
    unrelated = [each for each in unnamed if each not in copies and not _names_padding_source(each, base.root)]
    is_other_revision = not all(
        may_be_same_revision(each.revision, base.revision) for each in adapters.adapters if each not in copies
    )
    if unrelated:
        detail = (
            "The adapter names another base: if it was trained on this one, add that name, or a pattern with *, to"
            " base_names."
        )
    elif is_other_revision:
        detail = "The adapter names another revision of this base: set base_revision to the one it was trained on."
    elif is_padded_base:
        detail = "The adapter was trained on a checkpoint that was padded from this base."
    elif copies:
        detail = f"The adapter names a copy of this base: {'; '.join(sorted(set(copies.values())))}."
    elif unnamed:
        detail = "The base's manifest says that the base was padded from the checkpoint that the adapter names."
    else:
        detail = "The adapter names this base."
    known = ", ".join(sorted(base.names) or [base.root.name])
    return BASE_MATCHES.report(
        passed=not unrelated and not is_other_revision,
        severity="ERROR" if base.names or is_other_revision else "WARN",
        measured=", ".join(sorted({_declared_base(adapter) for adapter in adapters.adapters})),
        limit=known + (f" at {base.revision}" if base.revision else ""),
        detail=detail,
    )


def copy_rule(declared: str | None, base: KnownBase) -> str | None:
    """Return the rules by which a name is that of a copy of a base, for a message; None if it is not."""
    if not declared:
        return None
    if pattern := next((name for name in base.names if fnmatchcase(declared, name)), None):
        return f"{declared} matches {pattern} in base_names"
    found = _parts(declared)
    matches = [name for name in map(_parts, base.names or [base.root.name]) if _is_copy(found, name)]
    if not matches or not _agrees(Path(declared), base.root):
        return None
    return f"{declared} is {' and '.join(found.rules or ['the model of that name'])}"


def _is_copy(found: _Name, known: _Name) -> bool:
    """Return whether the names of two models agree, and their owners, as far as they tell: a folder has none."""
    owners = {found.owner, known.owner} - {None}
    return found.model == known.model and (len(owners) < 2) and (found.owner in (None, known.owner, "qwen"))


def _parts(name: str) -> _Name:
    """Return the parts of a name without a local folder, a mirror and the ending of a quantized copy."""
    parts, rules = [part for part in name.rstrip("/").split("/") if part], list[str]()
    if cached := next((match for part in parts if (match := _CACHED.fullmatch(part))), None):
        parts, rules = [cached[1], cached[2]], ["a copy in a hub's cache"]
    elif name.startswith(("/", ".", "~")) or len(parts) > 2:
        parts, rules = parts[-1:], ["a local copy with the base's name"]
    owner, model = (parts[0].lower() if len(parts) == 2 else None), (parts or [""])[-1].lower()
    if owner in MIRRORS:
        owner, rules = None, [*rules, f"a mirror by {parts[0]}"]
    for ending, way in QUANTIZED.items():
        if model.endswith(ending):
            model, rules = model.removesuffix(ending), [*rules, f"a copy quantized {way}"]
            break
    return _Name(owner=owner, model=model, rules=rules)


def _agrees(copy: Path, base: Path) -> bool:
    """Return whether the config of a copy, if it is on this machine, has the sizes of the base."""
    if not (copy / CONFIG).is_file() or not (base / CONFIG).is_file():
        return True
    try:
        ours, theirs = (load_json(root / CONFIG) for root in (base, copy))
        return all(config_values(ours, size) == config_values(theirs, size) for size in _SIZES)
    except (CheckpointRefused, TypeError):
        return False


def _declared_base(adapter: Adapter) -> str:
    return (adapter.base_name or "not named") + (f" at {adapter.revision}" if adapter.revision else "")


def _is_named(adapter: Adapter, base: KnownBase) -> bool:
    declared = adapter.base_name or ""
    if declared in base.names or (bool(declared) and Path(declared).resolve() == base.root.resolve()):
        return True
    return not base.names and Path(declared).name == base.root.name


def _names_padding_source(adapter: Adapter, base: Path) -> bool:
    """Check whether a base was padded from the checkpoint that an adapter names; false if its digest is not cached."""
    padded, named = padded_model(base), Path(adapter.base_name or "")
    if padded is None or not adapter.base_name or not (named / CONFIG).is_file():
        return False
    live = DigestCache().find(named)
    return live is not None and live.digest == padded.live_digest


def may_be_same_revision(one: str | None, other: str | None) -> bool:
    """Check whether two revisions can be the same: a commit may be abbreviated, or be the target of a branch."""
    if not one or not other or bool(_COMMIT.fullmatch(one)) != bool(_COMMIT.fullmatch(other)):
        return True
    return one.startswith(other) or other.startswith(one) if _COMMIT.fullmatch(one) else one == other
