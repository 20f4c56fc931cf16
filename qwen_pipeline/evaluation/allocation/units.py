"""The parts of a model that get one precision each, and their size in each of several quantizations of the model.

A unit is what serving engines build as one module (:mod:`qwen_pipeline.qwen.fused`) in one decoder layer. Its choices
are the codes of candidates, which are quantizations of the same checkpoint with other bits or groups, and its weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.fused import by_built_module
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.qwen.precision import KEEP, Precision
from qwen_pipeline.transforms.codes.gptq import CODES, gptq_format


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Linear layers of a decoder layer that get one precision.

    Attributes:
        layer: Number of the decoder layer.
        kind: Path of the module that engines build, such as ``self_attn.qkv_proj``.
        linears: Its linear layers.
        nbytes: Word of a precision -> bytes of codes or weights.
    """

    layer: int
    kind: str
    linears: Sequence[Linear]
    nbytes: Mapping[str, int]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(linear.out_features * linear.in_features for linear in self.linears)


def units_of(source: Checkpoint, candidates: Sequence[Checkpoint]) -> tuple[list[Unit], dict[str, Checkpoint]]:
    """Return the units of a checkpoint, and word of a precision -> the candidate that has it.

    Raises:
        InputRefused: There is no candidate, two have one precision, or one has several.
        CheckpointRefused: A candidate is not quantized by GPTQ.
    """
    linears = decoder_linears(source)
    by_word: dict[str, Checkpoint] = {}
    for candidate in candidates:
        word = _word(candidate, linears)
        if word in by_word:
            raise InputRefused(
                f"Two candidates have {word}.", remedy="Pass candidates that differ in bits or in group size."
            )
        by_word[word] = candidate
    if not by_word:
        raise InputRefused(
            "There is no candidate to take codes from.",
            remedy="Quantize the checkpoint with --bits 4 and with --bits 8, and pass both with --candidate.",
        )
    units = [
        Unit(layer=layer, kind=kind, linears=parts, nbytes=dict(_sizes(source, by_word, parts)))
        for (layer, kind), parts in by_built_module(linears).items()
    ]
    return units, by_word


def composed(
    source: Checkpoint, candidates: Mapping[str, Checkpoint], units: Sequence[Unit], words: Sequence[str]
) -> Checkpoint:
    """Return a checkpoint with the codes of each unit's chosen candidate, or its weights; nothing is rounded again."""
    taken = {
        linear: candidates[word]
        for unit, word in zip(units, words, strict=True)
        if word != KEEP
        for linear in unit.linears
    }
    form = next(iter(candidates.values())).config["quantization_config"]
    tensors = dict(source.tensors)
    for linear, candidate in taken.items():
        tensors.pop(linear.tensor, None)
        tensors |= {name: candidate.tensors[name] for name in code_names(linear)}
    shards = {name: source.shards.get(name, "composed.safetensors") for name in tensors}
    return Checkpoint(config={**source.config, "quantization_config": form}, tensors=tensors, shards=shards)


def code_names(linear: Linear) -> list[str]:
    """Return the names of the tensors that hold a linear layer's codes."""
    return [f"{linear.module}.{code}" for code in CODES]


def _word(candidate: Checkpoint, linears: Sequence[Linear]) -> str:
    form = gptq_format(candidate.config)
    missing = next((linear.module for linear in linears if f"{linear.module}.qweight" not in candidate), None)
    words = {
        str(Precision(bits=own.bits, group_size=own.group_size))
        for own in (form.of(candidate, linear.module) for linear in linears)
    }
    if missing or len(words) != 1:
        found = f"no codes for {missing}" if missing else f"codes of {', '.join(sorted(words))}"
        raise InputRefused(
            f"A candidate has {found}, expected one precision for all linear layers of the decoder.",
            remedy="Quantize the checkpoint without --module and with --precision uniform.",
        )
    return words.pop()


def _sizes(
    source: Checkpoint, candidates: Mapping[str, Checkpoint], linears: Sequence[Linear]
) -> Iterator[tuple[str, int]]:
    for word, candidate in candidates.items():
        yield word, sum(candidate[name].nbytes for linear in linears for name in code_names(linear))
    numel = sum(linear.out_features * linear.in_features for linear in linears)
    yield KEEP, numel * source[linears[0].tensor].torch_dtype.itemsize
