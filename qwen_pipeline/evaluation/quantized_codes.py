"""The comparison of a quantized model with the weights that it was made from, where these already are.

Forward passes on a GPU read each layer of both models; its tensors are compared there before they are freed. Without a
GPU, or if a forward pass does not read them all, they are read for the comparison.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.findings import MERGED, PADDED, QUANTIZED
from qwen_pipeline.evaluation.logits.streamed import NOTHING, InPassing, Stored
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.evaluation.origin import quantized_from
from qwen_pipeline.evaluation.structure.check import Structure, compared, refused_structure, structure_of
from qwen_pipeline.evaluation.structure.floats import check_floats
from qwen_pipeline.evaluation.structure.packed_layers import PackedLayers, codes_of
from qwen_pipeline.evaluation.tensor_parallel.findings import ShardingFindings
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.layerwise.prefetch import Prefetcher
from qwen_pipeline.progress import Observe
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.fp8 import is_fp8

AHEAD_BYTES = 4 * 2**30
"""Bytes of weights and codes that a GPU holds before they are compared, if they are read for that alone."""


class QuantizedCodes:
    """The packed layers of a quantized model, which are checked one decoder layer at a time.

    Args:
        source: The weights that became codes.
        candidate: The quantized model.
        measurement: Shardings to simulate, and tensors that are known to be equal.
        observe: Called for each decoder layer.
    """

    def __init__(self, source: Checkpoint, candidate: Checkpoint, measurement: Measurement, observe: Observe) -> None:
        self._source, self._candidate, self._observe = source, candidate, observe
        self._equal = frozenset(measurement.equal)
        self._is_floats = is_fp8(candidate.config.get("quantization_config") or {})
        self._refusal: CheckpointRefused | None = None
        self._by_layer: dict[int, list[Linear]] = {}
        try:
            self._layers = PackedLayers(source, candidate, measurement.shardings)
        except CheckpointRefused as refusal:
            self._refusal = refusal
        else:
            groups = groupby(self._layers.linears, key=lambda linear: linear.layer)
            self._by_layer = {layer: list(group) for layer, group in groups}

    @classmethod
    def of(cls, measurement: Measurement, models: Mapping[str, Checkpoint], observe: Observe) -> "QuantizedCodes":
        """Find the weights that the quantized model of a measurement was made from."""
        candidate, root = models[QUANTIZED], Path(measurement.models[QUANTIZED])
        source = quantized_from(models[MERGED], models.get(PADDED), candidate, root)
        return cls(source, candidate, measurement, observe)

    def in_passing(self, models: Mapping[str, Checkpoint], context: ComputeContext) -> InPassing:
        """Return the comparison of layers that an evaluation of ``models`` reads, on a GPU.

        Args:
            models: Role -> model.
            context: Device of the evaluation; a CPU has not the memory for the layers of two models.
        """
        names = {linear.tensor for linears in self._by_layer.values() for linear in linears}
        source = next(
            (role for role in (PADDED, MERGED) if role in models and self._is_source(models[role], names)), ""
        )
        if not (context.has_own_memory and source and QUANTIZED in models):
            return NOTHING
        return InPassing(
            keeping=(source, QUANTIZED),
            use=lambda layer, kept: self._check(layer, kept[source], kept[QUANTIZED]),
        )

    def findings(self, context: ComputeContext) -> tuple[Structure, list[ShardingFindings]]:
        """Read and check the layers that were not passed, compare all other tensors, and return the findings."""
        if self._is_floats:
            return check_floats(self._source, self._candidate, equal=self._equal, observe=self._observe), []
        if self._refusal:
            return refused_structure(self._refusal), []
        known = {linear.layer for linear in self._layers.findings}
        self._read({layer: linears for layer, linears in self._by_layer.items() if layer not in known}, context)
        structure = structure_of(self._layers, self._source, self._candidate, equal=self._equal)
        return structure, self._layers.sharding_findings

    def _is_source(self, model: Checkpoint, names: Collection[str]) -> bool:
        return bool(names) and all(self._source.tensors[name] is model.tensors.get(name) for name in names)

    @torch.inference_mode()
    def _check(self, layer: int, weights: Stored, codes: Stored) -> None:
        linears = self._by_layer.get(layer, [])
        source = _in_memory(self._source, weights, (linear.tensor for linear in linears))
        candidate = _in_memory(self._candidate, codes, (code for linear in linears for code in codes_of(linear)))
        for linear in linears:
            self._layers.check(linear, source, candidate)
        self._report()

    def _read(self, by_layer: Mapping[int, Sequence[Linear]], context: ComputeContext) -> None:
        """Read and check decoder layers, on a GPU or on all cores."""
        if not context.has_own_memory:
            linears = [linear for group in by_layer.values() for linear in group]
            self._layers.check_all(linears, self._source, self._candidate, tick=self._report)
            return
        wanted = {
            layer: (
                list(dict.fromkeys(linear.tensor for linear in linears)),
                [code for linear in linears for code in codes_of(linear) if code in self._candidate],
            )
            for layer, linears in by_layer.items()
        }
        tensors = [
            checkpoint.tensors[name]
            for names in wanted.values()
            for checkpoint, own in zip((self._source, self._candidate), names, strict=True)
            for name in own
        ]
        with Prefetcher(tensors, context.device, budget=AHEAD_BYTES) as prefetched:
            for layer, names in wanted.items():
                weights, codes = ({name: next(prefetched) for name in own} for own in names)
                self._check(layer, weights, codes)

    def _report(self) -> None:
        self._observe(compared(len(self._layers.findings), len(self._layers.linears)))


def _in_memory(checkpoint: Checkpoint, held: Stored, names: Iterable[str]) -> Checkpoint:
    """Return a checkpoint of some tensors, of which those that are in memory are not read."""
    found = {name: checkpoint.tensors[name] for name in names if name in checkpoint}
    return replace(checkpoint, tensors=found | dict(_lazy(checkpoint, held)), shards={})


def _lazy(checkpoint: Checkpoint, held: Stored) -> Iterator[tuple[str, LazyTensor]]:
    for name, tensor in held.items():
        yield name, LazyTensor(spec=checkpoint[name], read=lambda start, stop, rows=tensor: rows[start:stop])
