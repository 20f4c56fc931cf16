"""A config that describes the stored weights: where the two contradict each other, the weights decide.

Frameworks leave traces in configs: the quantization of a training on weights that were merged to full precision,
``tie_word_embeddings`` of a base whose head was trained on its own, ``layer_types`` of layers that were cut. Loaders
then differ: Transformers computes with the stored head, vLLM with the embedding. A contradiction that the weights
decide is settled in the config that stages write; any other is refused by the first stage that reads the model.

Sources: https://github.com/huggingface/transformers/issues/45127 (head), ``PreTrainedModel.tie_weights`` and
``_adjust_missing_and_unexpected_keys`` of Transformers 5.23; ``test_settle.py`` holds each statement against it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qwen_pipeline.checkpoint.hashing_reader import are_equal
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.config import REMOVED, is_quantized, quantization_settings, with_values
from qwen_pipeline.qwen.families import (
    TIED,
    config_items,
    declares_tied,
    require_family,
    tie_paths,
)
from qwen_pipeline.qwen.fused_weights import split_fused
from qwen_pipeline.qwen.heads import architectures_of, corrected_labels, head_kind
from qwen_pipeline.qwen.layers import number_of_layers
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.names import ParsedName, parse_names
from qwen_pipeline.reports import CheckReport, CheckSpec

CONFIG_MATCHES = CheckSpec(
    name="config_matches_weights",
    description="The config describes the stored weights; where it did not, the weights decided what is written.",
    blocking=False,
)
_BUFFER = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|_extra_state)")
"""Tensors that are not weights: Transformers computes the former, and nothing reads the latter."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Safetensors' names of dtypes -> the names in configs, which are torch's."""
_OTHER_NAMES = {"half": "float16", "float": "float32", "double": "float64"}
_EMBEDDING = ParsedName(part="embedding", module="embed_tokens", parameter="weight")
_HEAD = ParsedName(part="head", module="lm_head", parameter="weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A checkpoint whose config describes its weights.

    Attributes:
        checkpoint: The checkpoint; unchanged if nothing was settled.
        corrections: A sentence for each correction of the config.
        left_behind: Names of stored buffers that are not weights, and that the checkpoint no longer has.
        split: A sentence for each kind of fused matrix that was split; see :func:`split_fused`.
    """

    checkpoint: Checkpoint
    corrections: Sequence[str] = ()
    left_behind: Sequence[str] = ()
    split: Sequence[str] = ()

    @property
    def remarks(self) -> list[str]:
        """All that differs from what is stored, as sentences."""
        buffers = f"buffers that are no weights, left behind: {listed(self.left_behind)}"
        return [*self.corrections, *self.split, *([buffers] if self.left_behind else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """The weights of a checkpoint by meaning, and what is known about them besides its config."""

    checkpoint: Checkpoint
    names: Mapping[ParsedName, str]
    reads_values: bool
    tied_base: bool

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config


@dataclass(frozen=True, slots=True, kw_only=True)
class _Correction:
    """New values of a config, path -> value, and the reason."""

    values: Mapping[str, Any]
    reason: str

    @property
    def sentence(self) -> str:
        shown = [f"{path} {'removed' if value is REMOVED else _short(value)}" for path, value in self.values.items()]
        return f"{', '.join(shown)}: {self.reason}"


def settle(checkpoint: Checkpoint, *, reads_values: bool = True, tied_base: bool = False) -> Settled:
    """Return a checkpoint with the config that its weights require, without buffers that are not weights.

    Fused matrices are split, in the usual order of their rows.

    A quantized checkpoint is returned unchanged: its config belongs to its codes.

    Args:
        checkpoint: A checkpoint of any Qwen family.
        reads_values: Whether to read embedding and head, if both are stored and the config says that they are one.
        tied_base: Whether it was trained from a base whose head is the embedding: then so is a head that is missing.

    Raises:
        InputRefused: The family is unknown, or the config lacks a size.
        CheckpointRefused: A tensor is unknown or stored twice, the head is missing, or layers or rows of the vocabulary
            contradict each other; the message names both sides.
    """
    if is_quantized(checkpoint):
        return Settled(checkpoint=checkpoint)
    buffers = [name for name in checkpoint if _BUFFER.fullmatch(name)]
    split = split_fused(checkpoint.without(buffers) if buffers else checkpoint)
    weights = split.checkpoint
    stored = _Stored(checkpoint=weights, names=parse_names(weights), reads_values=reads_values, tied_base=tied_base)
    found = [correction for rule in _RULES for correction in rule(stored)]
    values = {path: value for correction in found for path, value in correction.values.items()}
    return Settled(
        checkpoint=weights.replace(config=with_values(weights.config, values)) if values else weights,
        corrections=[correction.sentence for correction in found],
        left_behind=buffers,
        split=split.remarks,
    )


def settled_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose fields agree with each other, for a model whose weights are not here.

    Raises:
        CheckpointRefused: Fields contradict each other.
    """
    unstored = _Stored(
        checkpoint=Checkpoint(config=config, tensors={}, shards={}), names={}, reads_values=False, tied_base=False
    )
    return with_values(config, {path: v for found in _layer_types(unstored) for path, v in found.values.items()})


def require_sizes(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint after checking that the decoder's weights have the sizes of its config.

    Raises:
        CheckpointRefused: A weight has another shape, or is missing.
    """
    if not is_quantized(checkpoint):
        decoder_linears(checkpoint)
    return checkpoint


def require_settled(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint after checking that its config describes its weights, and that all its tensors are weights.

    Raises:
        InputRefused: See :func:`settle`; or a correction is needed, which the message names.
    """
    if remarks := settle(checkpoint).remarks:
        raise CheckpointRefused(
            f"The config does not describe the stored weights: {listed(remarks)}.",
            remedy="Run qwen-pipeline pad on it first: it writes a checkpoint whose config does. With --tp 1 and a"
            " group size that divides the MLP, the weights stay as they are.",
        )
    return checkpoint


def config_report(settled: Settled, *more: str) -> CheckReport:
    """Report on :data:`CONFIG_MATCHES`; ``more`` are sentences about other corrections."""
    remarks = [*settled.remarks, *more]
    return CONFIG_MATCHES.report(
        passed=not remarks,
        measured=float(len(remarks)),
        limit=0.0,
        detail=f"What is written differs from what was stored: {'; '.join(remarks)}."
        if remarks
        else "The config describes the stored weights.",
    )


def _quantization(stored: _Stored) -> Iterator[_Correction]:
    settings = quantization_settings(stored.config)
    if settings:
        yield _Correction(values=dict.fromkeys(settings, REMOVED), reason="the weights are stored in full precision")


def _head(stored: _Stored) -> Iterator[_Correction]:
    """Yield whether the head is the embedding: a stored head of other values is not, and a missing one is."""
    config, family, has_head = stored.config, require_family(stored.config), _HEAD in stored.names
    says_tied = declares_tied(config) or any(config_items(config, TIED).values())
    if head_kind(stored.checkpoint) != "language":
        return
    if not has_head and not declares_tied(config):
        if not family.ties or not (says_tied or stored.tied_base):
            raise _missing_head(family.ties)
        reason = "no head is stored, and the base's is the embedding" if not says_tied else "no head is stored"
        yield _Correction(values=dict.fromkeys(tie_paths(config), True), reason=reason)
    elif has_head and says_tied and family.ties and stored.reads_values:
        names = stored.names[_EMBEDDING], stored.names[_HEAD]
        if not are_equal(*(stored.checkpoint.tensors[name] for name in names)):
            reason = f"the stored {names[1]} is not {names[0]}"
            yield _Correction(values=dict.fromkeys(tie_paths(config), False), reason=reason)


def _missing_head(can_tie: bool) -> CheckpointRefused:
    tie = f", or set {TIED} to true in its config.json if the head is the embedding" if can_tie else ""
    return CheckpointRefused(
        "The checkpoint has no output head (lm_head.weight), and its config does not say that the embedding is the"
        " head: Transformers would start from a random one.",
        remedy=f"Provide the shard with lm_head.weight{tie}.",
    )


def _layers(stored: _Stored) -> Iterator[_Correction]:
    """Require that the decoder's layers are those that the config counts."""
    number = number_of_layers(stored.config)
    layers = sorted({parsed.layer for parsed in stored.names if parsed.part == "decoder" and parsed.layer is not None})
    if len(layers) != number or layers[-1:] != [number - 1]:
        expected = range(min(number, len(layers) + 1))
        missing = [str(layer) for layer in expected if layer not in layers]
        more = [str(layer) for layer in layers if layer >= number]
        sides = [f"layers {listed(missing)} are missing"] * bool(missing) + [
            f"layers {listed(more)} are stored too"
        ] * bool(more)
        raise CheckpointRefused(
            f"The config has num_hidden_layers {number}, but {' and '.join(sides)}.",
            remedy=f"If layers were cut or added, set num_hidden_layers to {len(layers)} in config.json and number the"
            " layers from 0; if not, fetch all shards again.",
        )
    yield from ()


def _layer_types(stored: _Stored) -> Iterator[_Correction]:
    """Yield the types of as many layers as there are, if all are of one type; else they cannot be assigned."""
    for path, types in config_items(stored.config, "layer_types").items():
        if types is None:
            continue
        number = number_of_layers(stored.config)
        if not types or len(types) == number or (len(types) < number and not stored.names):
            continue
        if len(set(types)) > 1:
            raise CheckpointRefused(
                f"{path} has {len(types)} entries of several types, but num_hidden_layers is {number}.",
                remedy=f"Correct {path} in config.json: one entry for each layer, in order.",
            )
        yield _Correction(values={path: types[:1] * number}, reason=f"it had {len(types)} entries for {number} layers")


def _vocabulary(stored: _Stored) -> Iterator[_Correction]:
    """Yield the number of rows of the embedding, which the head must have too."""
    names = [stored.names[place] for place in (_EMBEDDING, _HEAD) if place in stored.names]
    rows = {name: stored.checkpoint[name].rows for name in names}
    if _EMBEDDING not in stored.names:
        raise CheckpointRefused(
            "The checkpoint has no embedding (embed_tokens.weight).",
            remedy="Pass a complete Hugging Face model directory.",
        )
    if len(set(rows.values())) > 1:
        raise CheckpointRefused(
            f"Embedding and head differ in their rows: {', '.join(f'{name} has {n}' for name, n in rows.items())}.",
            remedy="Save the model again after resizing both.",
        )
    size = rows[stored.names[_EMBEDDING]]
    wrong = {path: size for path, value in config_items(stored.config, "vocab_size").items() if value != size}
    if wrong:
        yield _Correction(values=wrong, reason="the stored embedding has as many rows")


def _dtype(stored: _Stored) -> Iterator[_Correction]:
    """Yield the dtype that most of the decoder's weights have, if the outermost section that states one is wrong.

    Transformers and vLLM read no other; what Transformers leaves in the sections below is that of an earlier load.
    """
    sizes: Counter[str] = Counter()
    for parsed, name in stored.names.items():
        if parsed.part == "decoder" and (spec := stored.checkpoint[name]).dtype in _DTYPES:
            sizes[_DTYPES[spec.dtype]] += spec.nbytes
    for dtype, _ in sizes.most_common(1):
        for field in ("dtype", "torch_dtype"):
            stated = {path: _plain(value) for path, value in config_items(stored.config, field).items() if value}
            if next(iter(stated.values()), dtype) != dtype:
                yield _Correction(values=dict.fromkeys(stated, dtype), reason="the decoder's weights are stored so")


def _plain(dtype: str) -> str:
    """Return the usual name of a dtype in a config, which may be written as torch prints it."""
    name = dtype.removeprefix("torch.")
    return _OTHER_NAMES.get(name, name)


def _architectures(stored: _Stored) -> Iterator[_Correction]:
    known = architectures_of(head_kind(stored.checkpoint), stored.config)
    value = stored.config.get("architectures")
    declared = cast("list[Any]", value) if isinstance(value, list) else []
    if not any(name in known for name in declared):
        yield _Correction(
            values={"architectures": [known[0]]},
            reason=f"the weights are those of this class, and {', '.join(map(str, declared)) or 'none'} was declared",
        )


def _labels(stored: _Stored) -> Iterator[_Correction]:
    if values := corrected_labels(stored.checkpoint):
        yield _Correction(values=values, reason="the stored score has as many rows")


_Rule = Callable[[_Stored], Iterator[_Correction]]
_RULES: tuple[_Rule, ...] = (
    _layers, _layer_types, _vocabulary, _head, _quantization, _labels, _architectures, _dtype
)  # fmt: skip


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
