"""Check a quantized checkpoint against the full-precision one that it was made from, by its headers and codes.

No model is loaded: the header of every tensor is compared, and every code is dequantized.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.structure.weights import (
    PaddingFindings,
    WeightComparison,
    WeightError,
    check_padding,
    compare_weight,
)
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.exclusions import excluding_rule
from qwen_pipeline.transforms.codes.gptq import CODES, GptqFormat, PackedLinear, gptq_format

FIELDS_OF_SAVING = frozenset({"dtype", "torch_dtype", "transformers_version", "quantization_config", "_name_or_path"})
"""Config fields that describe how a checkpoint was saved; all others describe what it computes."""

MAX_RELATIVE_ERROR = 0.5
"""Rounding to 4 bits gives about 0.1; beyond this limit the codes are of another weight, such as another layer's."""

MAX_SATURATED = 0.25
"""Largest share of codes at the ends of their range: usually one or two in a group, a fifth if scales are halved."""

Expected = Mapping[str, tuple[TensorSpec, ...]]
"""Tensor name -> the allowed dtypes and shapes."""


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
    """Compare ``candidate`` with ``source``, the checkpoint that was quantized.

    Every linear layer of the decoder must be quantized; every other tensor must equal the source's bit for bit, except
    that the bias of a quantized layer may be rounded to float16. Memory holds one layer's codes and one block of rows.
    """
    try:
        form = gptq_format(candidate.config)
    except CheckpointRefused as refusal:
        return Structure(problems=[refusal.what], padding=PaddingFindings())
    linears = decoder_linears(source)
    expected = _expected(source, linears, form)
    problems = [
        *_config_problems(source.config, candidate.config),
        *_sidecar_problems(source, candidate),
        *_header_problems(expected, candidate),
        *_exclusion_problems(linears, candidate),
    ]

    comparisons: dict[tuple[int, str], WeightComparison] = {}
    for done, linear in enumerate(linears, start=1):
        if _agree(candidate, expected, (f"{linear.module}.{code}" for code in CODES)):
            packed = form.load(candidate, linear.module)
            code_problems = list(_code_problems(linear, packed))
            problems += code_problems
            if packed.g_idx.min() < 0 or packed.g_idx.max() >= len(packed.scales):
                problems.append(f"{linear.module}.g_idx has indices of groups that do not exist.")
                continue
            comparison = comparisons[linear.layer, linear.kind] = compare_weight(source, linear, packed)
            problems += [] if code_problems else _weight_problems(comparison)
        observe(Progress(task="compare weights", done=done, total=len(linears), unit="modules"))
    problems += [
        f"{name} differs from its value before quantization."
        for name in source
        if name in expected and _agree(candidate, expected, [name]) and _changed(source, candidate, name)
    ]
    return Structure(
        problems=problems,
        padding=check_padding(comparisons),
        errors=[found.error for found in comparisons.values() if isfinite(found.error.relative)],
    )


def _expected(source: Checkpoint, linears: Sequence[Linear], form: GptqFormat) -> Expected:
    modules, weights = {linear.module for linear in linears}, {linear.tensor for linear in linears}
    expected: dict[str, tuple[TensorSpec, ...]] = {}
    for name, spec in source.items():
        if name in weights:
            continue
        is_bias = name.rpartition(".")[0] in modules
        expected[name] = (spec, TensorSpec(dtype="F16", shape=spec.shape)) if is_bias else (spec,)
    for linear in linears:
        codes = form.code_specs(linear.out_features, linear.in_features)
        expected |= {f"{linear.module}.{code}": (packed,) for code, packed in codes.items()}
    return expected


def _config_problems(source: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(source.keys() - FIELDS_OF_SAVING):
        if field not in candidate:
            yield f"config.json has no {field}, expected {source[field]!r}."
        elif candidate[field] != source[field]:
            yield f"config.json has {field} {candidate[field]!r}, expected {source[field]!r}."


def _exclusion_problems(linears: Sequence[Linear], candidate: Checkpoint) -> Iterator[str]:
    config = candidate.config["quantization_config"]
    for linear in linears:
        if f"{linear.module}.qweight" in candidate and (rule := excluding_rule(config, linear.module)):
            yield f"quantization_config.dynamic excludes {linear.module} by {rule!r}, but it has codes."


def _sidecar_problems(source: Checkpoint, candidate: Checkpoint) -> Iterator[str]:
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
        return json.loads(content) if sidecar.suffix == ".json" else content
    except ValueError:
        return content


def _header_problems(expected: Expected, candidate: Checkpoint) -> Iterator[str]:
    for name, allowed in expected.items():
        if name not in candidate:
            yield f"{name} is missing."
        elif candidate[name] not in allowed:
            found, spec = candidate[name], allowed[0]
            yield f"{name} is {found.dtype} {list(found.shape)}, expected {spec.dtype} {list(spec.shape)}."
    for name in candidate:
        if name not in expected:
            yield f"{name} is unexpected."


def _code_problems(linear: Linear, packed: PackedLinear) -> Iterator[str]:
    scales, form = packed.scales, packed.format
    if count := int((~torch.isfinite(scales)).sum()):
        yield f"{linear.module}.scales has {count} values that are not finite."
    elif count := int((scales == 0).sum()):
        yield f"{linear.module}.scales has {count} values that are zero."
    off_middle = _off_middle(linear, packed)
    if off_middle and form.sym:
        yield f"{linear.module}.qzeros has {off_middle} zero points that are not the middle code, although sym is true."
    elif not off_middle and not form.sym:
        yield f"{linear.module}.qzeros: sym is false, but every zero point is the middle code."
    in_order = torch.arange(linear.in_features, dtype=torch.int32) // form.inputs_per_group(linear.in_features)
    if not form.desc_act and not torch.equal(packed.g_idx, in_order):
        yield f"{linear.module}.g_idx is not in order, although desc_act is false."
    elif not torch.equal(packed.g_idx.sort().values, in_order):
        yield f"{linear.module}.g_idx does not give each group its {form.group_size} inputs."


def _off_middle(linear: Linear, packed: PackedLinear) -> int:
    """Return the number of zero points that are not the middle code."""
    return int((packed.zeros(0, linear.out_features) != 2 ** (packed.format.bits - 1)).sum())


def _weight_problems(comparison: WeightComparison) -> Iterator[str]:
    module, relative, groups = comparison.error.module, comparison.error.relative, comparison.groups
    if comparison.after.zero_rows.all() and not comparison.before.zero_rows.all():
        yield f"{module} is all zeros."
    elif relative > MAX_RELATIVE_ERROR:
        yield f"{module} decodes to another weight: the relative error is {relative:.0%}."
    elif groups.count and isfinite(relative):
        yield f"{module}: {groups.count} groups decode to other weights; {groups.sentence}."
    if comparison.saturated > MAX_SATURATED:
        yield f"{module}: {comparison.saturated:.0%} of its codes are at an end of their range: scales are too small."


def _changed(source: Checkpoint, candidate: Checkpoint, name: str) -> bool:
    dtype = candidate[name].torch_dtype
    blocks = (slice(start, stop) for start, stop in block_ranges(source[name]))
    return not all(torch.equal(source.load(name, rows).to(dtype), candidate.load(name, rows)) for rows in blocks)


def _agree(candidate: Checkpoint, expected: Expected, names: Iterable[str]) -> bool:
    return all(name in candidate and candidate[name] in expected[name] for name in names)
