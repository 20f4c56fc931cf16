"""Check a quantized checkpoint against the full-precision one that it was made from, by its headers and codes.

No model is loaded: the header of every tensor is compared, and every code is dequantized.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.files import parse_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.structure.packed_layers import Expected, PackedLayers, agree
from qwen_pipeline.evaluation.structure.weights import (
    PaddingFindings,
    WeightComparison,
    WeightError,
    check_padding,
    kept_weight,
)
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.qwen.fused import built_kind
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import GptqFormat
from qwen_pipeline.transforms.codes.module_rules import declared_format, excluding_rule

FIELDS_OF_SAVING = frozenset({"dtype", "torch_dtype", "transformers_version", "quantization_config", "_name_or_path"})
"""Config fields that describe how a checkpoint was saved; all others describe what it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The findings about the structure of a quantized checkpoint.

    Attributes:
        problems: A sentence for each fault; it names the tensor or the config field.
        padding: The findings about the channels that padding added.
        errors: The error of each quantized weight whose codes are finite, layer by layer.
    """

    problems: Sequence[str]
    padding: PaddingFindings
    errors: Sequence[WeightError] = ()


def check_structure(source: Checkpoint, candidate: Checkpoint, *, observe: Observe = unobserved) -> Structure:
    """Compare ``candidate`` with ``source``, the checkpoint that was quantized, on all cores.

    Every linear layer of the decoder must have the codes, or the weight, that its config declares; every other tensor
    must equal the source's bit for bit, except that the bias of a layer with codes may be rounded to float16. Memory
    holds a layer's codes and a block of rows for each thread.
    """
    try:
        layers = PackedLayers(source, candidate)
    except CheckpointRefused as refusal:
        return refused_structure(refusal)
    layers.check_all(
        layers.linears,
        source,
        candidate,
        tick=lambda: observe(compared(len(layers.findings), len(layers.linears))),
    )
    return structure_of(layers, source, candidate)


def compared(done: int, total: int) -> Progress:
    """Return the progress of comparing weights."""
    return Progress(task="compare weights", done=done, total=total, unit="modules")


def refused_structure(refusal: CheckpointRefused) -> Structure:
    """Return the findings about a candidate whose config describes no codes that can be read."""
    return Structure(problems=[refusal.what], padding=PaddingFindings())


def structure_of(
    layers: PackedLayers, source: Checkpoint, candidate: Checkpoint, *, equal: Collection[str] = ()
) -> Structure:
    """Return the findings, once every packed layer is checked; all other tensors are compared here.

    Args:
        layers: The packed layers.
        source: The checkpoint that was quantized.
        candidate: Its codes.
        equal: Tensors that are known to be equal in both, which are not read.
    """
    expected, found = layers.expected, layers.findings
    comparisons = {(linear.layer, linear.kind): each.comparison for linear, each in found.items() if each.comparison}
    problems = [
        *config_problems(source.config, candidate.config),
        *sidecar_problems(source, candidate),
        *header_problems(expected, candidate),
        *_rule_problems(layers.all_linears, candidate, layers.form),
        *(problem for each in found.values() for problem in each.problems),
        *changed_problems(source, candidate, {name: expected[name] for name in expected if name not in equal}),
    ]
    return Structure(
        problems=problems,
        padding=check_padding(comparisons | _kept_beside(source, layers.all_linears, comparisons)),
        errors=[each.error for each in comparisons.values() if isfinite(each.error.relative)],
    )


def _kept_beside(
    source: Checkpoint, linears: Sequence[Linear], coded: Mapping[tuple[int, str], WeightComparison]
) -> dict[tuple[int, str], WeightComparison]:
    """Return the kept weights of MLPs that have codes too."""
    owners = {(layer, kind.rpartition(".")[0]) for layer, kind in coded if ".mlp." in f".{kind}"}
    return {
        (linear.layer, linear.kind): kept_weight(source, linear)
        for linear in linears
        if (linear.layer, linear.kind) not in coded and (linear.layer, linear.kind.rpartition(".")[0]) in owners
    }


def config_problems(source: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(source.keys() - FIELDS_OF_SAVING):
        if field not in candidate:
            yield f"config.json has no {field}, expected {source[field]!r}."
        elif candidate[field] != source[field]:
            yield f"config.json has {field} {candidate[field]!r}, expected {source[field]!r}."


def _rule_problems(linears: Sequence[Linear], candidate: Checkpoint, form: GptqFormat) -> Iterator[str]:
    """Compare what ``dynamic`` declares with what is stored, by the checkpoint's names and by those of engines."""
    settings = candidate.config["quantization_config"]
    for linear in linears:
        if f"{linear.module}.qweight" in candidate and (rule := excluding_rule(settings, linear.module)):
            yield f"quantization_config.dynamic excludes {linear.module} by {rule!r}, but it has codes."
            continue
        built = linear.module.removesuffix(linear.kind) + built_kind(linear.kind)
        own, as_built = (declared_format(settings, module, form) for module in (linear.module, built))
        if own != as_built:
            yield (
                f"quantization_config.dynamic declares {_shown(own)} for {linear.module}, but {_shown(as_built)} for"
                f" {built}, the module that engines build for it."
            )


def _shown(form: GptqFormat | None) -> str:
    return f"{form.bits} bits in groups of {form.group_size}" if form else "no codes"


def sidecar_problems(source: Checkpoint, candidate: Checkpoint) -> Iterator[str]:
    """Compare tokenizer, chat template and generation config, which affect answers too; only JSON layout may differ."""
    for path in sorted(source.sidecars.keys() | candidate.sidecars.keys()):
        if path not in candidate.sidecars:
            yield f"{path} is missing."
        elif path not in source.sidecars:
            yield f"{path} is unexpected."
        elif _parsed(source.sidecars[path]) != _parsed(candidate.sidecars[path]):
            yield f"{path} differs from the fine-tune's."


def _parsed(sidecar: Path) -> Any:
    """Return the content of a file: JSON values, or bytes."""
    content = sidecar.read_bytes()
    try:
        return parse_json(content) if sidecar.suffix == ".json" else content
    except ValueError:
        return content


def header_problems(expected: Expected, candidate: Checkpoint) -> Iterator[str]:
    for name, allowed in expected.items():
        if name not in candidate:
            yield f"{name} is missing."
        elif candidate[name] not in allowed:
            found, spec = candidate[name], allowed[0]
            yield f"{name} is {found.dtype} {list(found.shape)}, expected {spec.dtype} {list(spec.shape)}."
    for name in candidate:
        if name not in expected:
            yield f"{name} is unexpected."


def changed_problems(source: Checkpoint, candidate: Checkpoint, expected: Expected) -> Iterator[str]:
    for name in source:
        if name in expected and agree(candidate, expected, [name]) and _changed(source, candidate, name):
            yield f"{name} differs from its value before quantization."


def _changed(source: Checkpoint, candidate: Checkpoint, name: str) -> bool:
    dtype = candidate[name].torch_dtype
    blocks = (slice(start, stop) for start, stop in block_ranges(source[name]))
    return not all(torch.equal(source.load(name, rows).to(dtype), candidate.load(name, rows)) for rows in blocks)
