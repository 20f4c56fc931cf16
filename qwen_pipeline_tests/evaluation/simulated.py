"""Findings of simulated ranks, without a worker."""

from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.structure.packed_layers import PackedLayers
from qwen_pipeline.evaluation.tensor_parallel.find import plan_targets, shardings_of, simulated_targets
from qwen_pipeline.evaluation.tensor_parallel.findings import Target, TargetFindings


def find_targets(source: Checkpoint, candidate: Checkpoint, targets: Sequence[Target]) -> list[TargetFindings]:
    """Return the findings for each target about ``candidate``, which was quantized from ``source``."""
    planned = plan_targets(candidate.config, targets)
    layers = PackedLayers(source, candidate, shardings_of(planned))
    layers.check_all(layers.linears, source, candidate, tick=lambda: None)
    return simulated_targets(planned, layers.sharding_findings)
