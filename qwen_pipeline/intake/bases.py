"""The base of a fine-tune, chosen among those of the settings by what the fine-tune itself says.

An adapter names its base, which is recognized by the rules of :mod:`qwen_pipeline.models.base_names`. A whole model has
the sizes of its base; among bases of the same sizes, a name in its config or its card decides. Where several bases fit
all the same, the patterns ``match`` of the bases decide.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.config_types import load_config_file
from qwen_pipeline.checkpoint.digest_cache import DigestCache
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint
from qwen_pipeline.checkpoint.manifest import Manifest
from qwen_pipeline.config import Settings, config_file, settings_of
from qwen_pipeline.config.inputs import base_model_name
from qwen_pipeline.errors import InputRefused, PipelineError
from qwen_pipeline.models.base_names import KnownBase, base_report, copy_rule
from qwen_pipeline.models.hub import cached_base, load_config
from qwen_pipeline.models.open import has_weights, open_fine_tune
from qwen_pipeline.models.padded import PaddedModel, trained_on
from qwen_pipeline.qwen.families import config_values
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet

ONLY = ""
"""The name of the base that the settings at the top level describe."""
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_experts")
_DETAILS = ("model_type", "vocab_size")
_CARD, _CARD_BYTES = "README.md", 2**14
_BASE_IN_CARD = re.compile(r"^base_model:\s*(?:-\s*)?([^\s\[\]]+)\s*$", re.MULTILINE)


def known_bases(settings: Settings) -> dict[str, KnownBase]:
    """Return the bases of the settings by their names; nothing is downloaded, so a directory may be missing."""
    return {name: _known(settings_of(settings, None, base=name or None)) for name in settings.bases or [ONLY]}


def _known(settings: Settings) -> KnownBase:
    model = base_model_name(settings)
    return KnownBase(
        root=cached_base(model, revision=settings.base_revision, relative_to=config_file().parent),
        names=(model, *settings.base_names),
        revision=settings.base_revision,
        weights=settings.base_weights,
    )


def choose_base(settings: Settings, name: str, root: Path, bases: Mapping[str, KnownBase] | None = None) -> str:
    """Return the name of the base of a fine-tune.

    Args:
        settings: The settings, with one base or several.
        name: The fine-tune's name.
        root: Its directory.
        bases: The :func:`known_bases` of the settings, if they are known already.

    Raises:
        InputRefused: The fine-tune cannot be opened, or it fits none of the bases or several.
    """
    bases, child = bases or known_bases(settings), open_fine_tune(root)
    if isinstance(child, AdapterSet):
        fitting = [each for each, base in bases.items() if _is_trained_on(base, child)]
        evidence, narrowings = _declared(child), list[Callable[[str], bool]]()
    elif len(bases) == 1:
        return next(iter(bases))
    else:
        configs = {each: _config_of(base) for each, base in bases.items()}
        fitting = [each for each, config in configs.items() if _agree(child.config, config, _SIZES)]
        names = declared_names(child, root)
        evidence = f"a model of {_sizes(child.config)}" + "".join(f" made from {each}" for each in names[:1])
        narrowings = [
            lambda each: any(declared in bases[each].names or copy_rule(declared, bases[each]) for declared in names),
            lambda each: _agree(child.config, configs[each], _DETAILS),
        ]
    narrowings.append(lambda each: any(fnmatchcase(name, pattern) for pattern in _patterns(settings, each)))
    for narrowing in narrowings:
        fitting = [each for each in fitting if narrowing(each)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    raise _several(evidence, fitting) if fitting else _unknown(evidence, bases)


def base_of_merged(settings: Settings, merged: Manifest) -> str | None:
    """Return the base that a checkpoint was merged into, by the names in its manifest; None if the settings lack it."""
    spec = merged.derivation.spec
    for each, base in known_bases(settings).items():
        if sorted(base.names) == list(spec["base_names"]) and spec.get("base_revision", base.revision) == base.revision:
            return each
    return None


def declared_names(child: Checkpoint, root: Path) -> list[str]:
    """Return the models that a whole model says it was made from, in its config and its card."""
    declared = [child.config.get("_name_or_path")]
    if (card := root / _CARD).is_file():
        with card.open("rb") as file:
            declared += _BASE_IN_CARD.findall(file.read(_CARD_BYTES).decode(errors="replace"))
    return [str(each) for each in declared if each]


def _is_trained_on(base: KnownBase, adapters: AdapterSet) -> bool:
    padded = trained_on(adapters)
    is_padded_base = padded is not None and _was_padded_from(padded, base)
    return base_report(base, adapters, is_padded_base=is_padded_base).passed


def _was_padded_from(padded: PaddedModel, base: KnownBase) -> bool:
    """Return whether a checkpoint was padded from a base; by its config alone if the base's digest is unknown."""
    if padded.live_digest and (digest := known_digest(base.root)):
        return padded.live_digest == digest
    return padded.live_config is not None and _agree(
        json.loads(padded.live_config), _config_of(base), (*_SIZES, *_DETAILS)
    )


def known_digest(root: Path) -> str | None:
    """Return the content digest of a base, if it is on this machine and was read before."""
    found = DigestCache().find(root) if has_weights(root) else None
    return found.digest if found else None


def _config_of(base: KnownBase) -> Mapping[str, Any] | None:
    """Return a base's config, which is downloaded if it has to be; None if it cannot be read."""
    if (base.root / CONFIG).is_file():
        return load_config_file(base.root / CONFIG)
    return _downloaded_config(next(iter(base.names)), base.revision)


@cache
def _downloaded_config(name: str, revision: str | None) -> Mapping[str, Any] | None:
    try:
        return load_config(name, revision=revision)
    except PipelineError:
        return None


def _agree(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, fields: tuple[str, ...]) -> bool:
    """Return whether two configs agree in some fields; an unknown one agrees with any."""
    return theirs is None or all(config_values(ours, field) == config_values(theirs, field) for field in fields)


def _patterns(settings: Settings, base: str) -> tuple[str, ...]:
    return settings.bases[base].match if base in settings.bases else ()


def _declared(adapters: AdapterSet) -> str:
    named = {(each.base_name, each.revision) for each in adapters.adapters}
    texts = sorted(f"{name!r}" + (f" at {revision}" if revision else "") for name, revision in named if name)
    return f"an adapter of {' and '.join(texts)}" if texts else "an adapter that names no base"


def _sizes(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {value}" for field in _SIZES for value in sorted(config_values(config, field), key=str))


def _several(evidence: str, fitting: list[str]) -> InputRefused:
    return InputRefused(
        f"It is {evidence}, and fits several bases: {', '.join(fitting)}.",
        remedy="Give the one that is meant a pattern of the fine-tune's name: match, in its section [bases.NAME] in"
        f" {config_file()}.",
    )


def _unknown(evidence: str, bases: Mapping[str, KnownBase]) -> InputRefused:
    return InputRefused(
        f"It is {evidence}, which is none of the bases in the settings: {', '.join(_titles(bases))}.",
        remedy=f"Add the base to {config_file()}, in a section [bases.NAME]; or, if it is another name of one of these,"
        " add that name, or a pattern with *, to the base's names.",
    )


def _titles(bases: Mapping[str, KnownBase]) -> Iterator[str]:
    for name, base in bases.items():
        model = next(iter(base.names)) + (f" at {base.revision}" if base.revision else "")
        yield f"{name} ({model})" if name else model
