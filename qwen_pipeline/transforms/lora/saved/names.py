"""PEFT's names of an adapter's tensors, from the names under which trainers save them.

PEFT leaves out the adapter's own name and writes ``base_model.model.`` once. A trainer that writes the state dict of a
wrapped model keeps the name and the wrappers, and converters drop the prefix (DeepSpeed#7429, verl#4553). PEFT ignores
tensors whose names it does not expect, and returns the unchanged base. Here they are read if they have exactly one
reading: all are spelled alike, and no two get the same name.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from qwen_pipeline.errors import AdapterRefused

PREFIX = "base_model.model."
_WRAPPERS: Mapping[str, str] = {
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_orig_mod": "torch.compile",
    "module": "data parallelism",
}
"""Modules that wrap another one, by their name in a path; no module of a Qwen model is called so."""
_NAMED_PARTS = (
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "trainable_tokens_delta",
)  # fmt: skip
"""Parts that the adapter's name follows in a state dict, before the parameter if there is one."""
_PARAMETERS = ("weight", "bias")
_SAVED = "modules_to_save"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """PEFT's names of the tensors of an adapter.

    Attributes:
        names: PEFT's name -> name in the file.
        differences: The ways in which the names in the file differ, for people; empty if they are PEFT's own.
    """

    names: Mapping[str, str]
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The reading of one name.

    Attributes:
        path: The name without prefix, wrappers and the adapter's name.
        prefixes: Number of prefixes.
        adapter: The adapter's name; None if the tensor has a part that it could follow, but does not.
        can_be_named: Whether it has such a part.
        wrappers: The wrappers on its path.
    """

    path: str
    prefixes: int
    adapter: str | None
    can_be_named: bool
    wrappers: frozenset[str]


def spelling_of(names: Collection[str], *, source: object) -> Spelling:
    """Return PEFT's names of an adapter's tensors; the names of the file if they have no single reading.

    Raises:
        AdapterRefused: The tensors are those of several adapters; ``source`` is the file, for the message.
    """
    readings = {name: _read(name) for name in names}
    adapters = sorted({reading.adapter for reading in readings.values() if reading.adapter})
    if len(adapters) > 1:
        raise AdapterRefused(
            f"{source} holds the tensors of several adapters: {', '.join(adapters)}.",
            remedy="Save the one that was trained by itself: model.save_pretrained(..., selected_adapters=[NAME]).",
        )
    are_named = {reading.adapter is not None for reading in readings.values() if reading.can_be_named}
    prefixes = {reading.prefixes for reading in readings.values()}
    paths = _without_saved_names({reading.path: name for name, reading in readings.items()}, adapters)
    if len(paths) < len(readings) or len(prefixes) > 1 or len(are_named) > 1:
        return Spelling(names={name: name for name in names})
    return Spelling(
        names={PREFIX + path: name for path, name in paths.items()},
        differences=tuple(_differences(readings.values(), adapters)),
    )


def _differences(readings: Collection[_Reading], adapters: Collection[str]) -> Iterator[str]:
    for wrapper in sorted({wrapper for reading in readings for wrapper in reading.wrappers}):
        yield f"inside the wrapper {wrapper} of {_WRAPPERS[wrapper]}"
    for name in adapters:
        yield f"with the adapter's name {name!r}"
    for count in {reading.prefixes for reading in readings} - {1}:
        yield f"with {PREFIX!r} {count} times" if count else f"without {PREFIX!r}"


def _read(name: str) -> _Reading:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    named = next((at for at, part in reversed(list(enumerate(parts, 1))) if part in _NAMED_PARTS), None)
    adapter = parts.pop(named) if named and parts[named:] and parts[named] not in _PARAMETERS else None
    path, prefixes = ".".join(parts), 0
    while path.startswith(PREFIX):
        path, prefixes = path.removeprefix(PREFIX), prefixes + 1
    return _Reading(
        path=path,
        prefixes=prefixes,
        adapter=adapter,
        can_be_named=named is not None,
        wrappers=frozenset(_WRAPPERS.keys() & set(name.split("."))),
    )


def _without_saved_names(paths: Mapping[str, str], adapters: Collection[str]) -> dict[str, str]:
    """Return paths with ``lm_head.modules_to_save.<name>.weight`` as ``lm_head.weight``, unless that is there too."""
    found: dict[str, str] = {}
    for path, name in paths.items():
        short = path
        for adapter in adapters:
            short = path.replace(f".{_SAVED}.{adapter}.", ".")
        found[path if short in paths else short] = name
    return found
