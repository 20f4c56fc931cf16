"""Check a checkpoint of 8-bit floats against the full-precision one that it was made from.

Rounding to the nearest E4M3 moves a weight by at most a sixteenth of its magnitude, or below the smallest normal float
by half a step, which is ``2**-10`` of its scale. So a scale or a code that is not that of its weight is found from each
weight alone, whichever tool rounded it: llm-compressor divides in bfloat16, which adds ``2**-8`` of the magnitude.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch.linalg import vector_norm

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.structure.check import (
    Structure,
    changed_problems,
    compared,
    config_problems,
    header_problems,
    refused_structure,
    sidecar_problems,
)
from qwen_pipeline.evaluation.structure.groups import GroupFaults
from qwen_pipeline.evaluation.structure.packed_layers import Expected, agree
from qwen_pipeline.evaluation.structure.weights import (
    RowsAndColumns,
    WeightComparison,
    WeightError,
    check_padding,
)
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.transforms.codes.fp8 import SCALE_DTYPES, Fp8Format, Fp8Linear, fp8_format
from qwen_pipeline.transforms.codes.to_fp8 import weight_rows

MAX_SHARE = 2**-4 + 2**-8
"""Largest error of a weight as a share of its magnitude."""
MAX_STEP = 2**-10 * (1 + 2**-6)
"""Largest error of a weight below the normal floats, as a share of its scale."""


def check_floats(
    source: Checkpoint, candidate: Checkpoint, *, equal: Collection[str] = (), observe: Observe = unobserved
) -> Structure:
    """Compare ``candidate`` with ``source``, the checkpoint that was rounded.

    Every linear layer of the decoder must be rounded, and named in the config if it is not; every other tensor must
    equal the source's bit for bit. Memory holds one layer's scales and one block of rows. Tensors that are known to be
    ``equal`` in both are not read.
    """
    settings = candidate.config.get("quantization_config") or {}
    try:
        form = fp8_format(settings)
    except CheckpointRefused as refusal:
        return refused_structure(refusal)
    linears = decoder_linears(source)
    expected = _expected(source, linears, form)
    problems = [
        *config_problems(source.config, candidate.config),
        *sidecar_problems(source, candidate),
        *header_problems(expected, candidate),
        *_exclusion_problems(linears, candidate, form),
    ]
    comparisons: dict[tuple[int, str], WeightComparison] = {}
    for done, linear in enumerate(linears, start=1):
        if agree(candidate, expected, (f"{linear.module}.{suffix}" for suffix in form.suffixes)):
            rounded = form.load(candidate, linear.module)
            if faults := list(_scale_problems(linear, rounded)):
                problems += faults
            else:
                comparison, wrong = _compare(source, linear, rounded)
                comparisons[linear.layer, linear.kind] = comparison
                problems += [wrong] if wrong else []
        observe(compared(done, len(linears)))
    read = {*equal, *(linear.tensor for linear in linears)}
    problems += changed_problems(source, candidate, {name: expected[name] for name in source if name not in read})
    return Structure(
        problems=problems,
        padding=check_padding(comparisons),
        errors=[found.error for found in comparisons.values() if isfinite(found.error.relative)],
    )


def _expected(source: Checkpoint, linears: Sequence[Linear], form: Fp8Format) -> Expected:
    """Return the allowed dtypes and shapes; other tools store scales in 16 bits."""
    weights = {linear.tensor for linear in linears}
    expected: dict[str, tuple[TensorSpec, ...]] = {
        name: (spec,) for name, spec in source.items() if name not in weights
    }
    for linear in linears:
        for suffix, spec in form.code_specs(linear.out_features, linear.in_features).items():
            dtypes = SCALE_DTYPES if suffix == form.layout.scale else (spec.dtype,)
            expected[f"{linear.module}.{suffix}"] = tuple(replace(spec, dtype=dtype) for dtype in dtypes)
    return expected


def _exclusion_problems(linears: Sequence[Linear], candidate: Checkpoint, form: Fp8Format) -> Iterator[str]:
    """Compare the names of layers in full precision with the layers that are."""
    settings = candidate.config["quantization_config"]
    rounded = {linear.module for linear in linears}
    for module in rounded:
        if entry := form.excluded(settings, module):
            yield f"quantization_config.{form.exclusions} excludes {module} by {entry!r}, but it has 8-bit floats."
    for name, spec in candidate.items():
        module, parsed = name.removesuffix(".weight"), parse_name(name, candidate.config)
        is_linear = name.endswith(".weight") and len(spec.shape) == 2 and "embed" not in parsed.module
        if is_linear and module not in rounded and not form.excluded(settings, module):
            yield f"quantization_config.{form.exclusions} does not name {module}, which is in full precision."


def _scale_problems(linear: Linear, rounded: Fp8Linear) -> Iterator[str]:
    name = f"{linear.module}.{rounded.format.layout.scale}"
    if count := int((~torch.isfinite(rounded.scales)).sum()):
        yield f"{name} has {count} values that are not finite."
    elif count := int((rounded.scales <= 0).sum()):
        yield f"{name} has {count} values that are not positive."


def _compare(source: Checkpoint, linear: Linear, rounded: Fp8Linear) -> tuple[WeightComparison, str]:
    """Return the comparison of a weight with its 8-bit floats, and a sentence if some are not those of the weight."""
    spec = TensorSpec(dtype=source[linear.tensor].dtype, shape=(linear.out_features, linear.in_features))
    before, after = (
        RowsAndColumns.of_shape(linear.out_features, linear.in_features, rounded.scales.device) for _ in range(2)
    )
    read, wrong, first = weight_rows(source, linear), 0, (0, 0)
    squared_error = squared_norm = 0.0
    for start, stop in block_ranges(spec):
        w_OI, v_OI = read(start, stop).float(), rounded.weight_rows(start, stop)
        before.update(start, w_OI)
        after.update(start, v_OI)
        error = (w_OI - v_OI).abs()
        limit = w_OI.abs().mul_(MAX_SHARE).maximum(rounded.scale_rows(start, stop) * MAX_STEP)
        faults = ~(error <= limit)
        if not wrong and faults.any():
            row, column = faults.nonzero()[0].tolist()
            first = start + row, column
        wrong += int(faults.sum())
        squared_error += vector_norm(error).item() ** 2
        squared_norm += vector_norm(w_OI).item() ** 2
    if block := rounded.format.layout.block:
        after.duplicate_rows[::block] = True  # rows of two blocks have two scales, so equal rows may round differently
    relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    found = WeightError(module=linear.module, layer=linear.layer, kind=linear.kind, relative=relative)
    comparison = WeightComparison(error=found, groups=GroupFaults(), saturated=0.0, before=before, after=after)
    return comparison, _sentence(linear, wrong, first)


def _sentence(linear: Linear, wrong: int, first: tuple[int, int]) -> str:
    if not wrong:
        return ""
    return (
        f"{linear.module}: {wrong} of {linear.out_features * linear.in_features} weights are not the 8-bit floats next"
        f" to the original ones; the first is at output {first[0]}, input {first[1]}."
    )
