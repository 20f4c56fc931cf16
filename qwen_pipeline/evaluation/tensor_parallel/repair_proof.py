"""Proof of a repair: a comparison of each widened layer, as sharded over ranks, with the original."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.evaluation.tensor_parallel.ranks import weight_over_ranks
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.transforms.codes.formats import CodeFormat
from qwen_pipeline.transforms.codes.gptq import PackedLinear
from qwen_pipeline.transforms.codes.parts import Widening, widened


@dataclass(slots=True)
class RepairFindings:
    """The numbers of compared weights, and a sentence for each faulty layer.

    Attributes:
        live_weights: Weights of the original layers.
        new_weights: Weights that the repair added.
        reordered: Layers whose inputs were not in group order.
        changed: Layers whose live weights changed.
        nonzero: Layers whose new weights are not zero.
    """

    live_weights: int = 0
    new_weights: int = 0
    reordered: int = 0
    changed: list[str] = field(default_factory=list[str])
    nonzero: list[str] = field(default_factory=list[str])


def prove_repair(
    before: Checkpoint,
    after: Checkpoint,
    form: CodeFormat,
    widenings: Mapping[str, Widening],
    *,
    ranks: int,
    observe: Observe = unobserved,
) -> RepairFindings:
    """Compare the weights of each widened layer before the repair, bit for bit, with those of ``ranks`` ranks after it.

    Memory holds the codes of one layer, before and after, and one block of rows at a time.
    """
    findings = RepairFindings()
    for done, (module, by) in enumerate(widenings.items(), start=1):
        if f"{module}.weight" in before:
            live, held = before.tensors[f"{module}.weight"], after.tensors[f"{module}.weight"]
        else:
            packed = form.load(before, module)
            findings.reordered += by.dimension == "in" and not packed.is_in_order
            live, held = _weight(packed), weight_over_ranks(form.load(after, module), by.dimension, ranks)
        _compare(module, live, held, by, findings)
        observe(Progress(task="prove", done=done, total=len(widenings), unit="modules"))
    return findings


def _compare(module: str, live: LazyTensor, held: LazyTensor, by: Widening, findings: RepairFindings) -> None:
    axis, positions = int(by.dimension == "in"), by.size.positions()
    expected = widened(live, axis, by.size.padded, positions)
    if held.spec.shape != expected.spec.shape:
        findings.changed.append(f"{module} is {list(held.spec.shape)}, expected {list(expected.spec.shape)}")
        return
    is_live = torch.zeros(by.size.padded, dtype=torch.bool).index_fill_(0, positions, value=True)
    changed = nonzero = 0
    for start, stop in block_ranges(expected.spec):
        original, found = expected.read(start, stop), held.read(start, stop)
        differing_bytes = original.view(torch.uint8).ne(found.view(torch.uint8))
        differs = differing_bytes.unflatten(1, (original.shape[1], -1)).any(dim=-1)
        of_live = is_live if axis else is_live[start:stop, None]
        changed += int((differs & of_live).sum())
        nonzero += int((found.ne(0) & ~of_live).sum())
    live_weights = live.spec.shape[0] * live.spec.shape[1]
    findings.live_weights += live_weights
    findings.new_weights += held.spec.shape[0] * held.spec.shape[1] - live_weights
    findings.changed += [f"{module}: {changed} of {live_weights} weights changed"] if changed else []
    findings.nonzero += [f"{module}: {nonzero} new weights are not zero"] if nonzero else []


def _weight(packed: PackedLinear) -> LazyTensor:
    outputs, inputs = packed.qweight.shape[1], len(packed.g_idx)
    return LazyTensor(spec=TensorSpec(dtype="F32", shape=(outputs, inputs)), read=packed.weight_rows)
