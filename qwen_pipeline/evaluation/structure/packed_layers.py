"""Checks of packed linear layers, one by one: their codes, the weights that these stand for, and their ranks' weights.

A layer's weight and codes are read once for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.evaluation.structure.weights import WeightComparison, compare_weight
from qwen_pipeline.evaluation.tensor_parallel.findings import Sharding, ShardingFindings
from qwen_pipeline.evaluation.tensor_parallel.simulate import sharded_matrices, sharding_errors
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES, GptqFormat, PackedLinear, gptq_format
from qwen_pipeline.transforms.codes.module_rules import declared_format

MAX_RELATIVE_ERROR = 0.5
"""Rounding to 4 bits gives about 0.1; beyond this limit the codes are of another weight, such as another layer's."""

MAX_SATURATED = 0.25
"""Largest share of codes at the ends of their range: usually one or two in a group, a fifth if scales are halved."""

Expected = Mapping[str, tuple[TensorSpec, ...]]
"""Tensor name -> the allowed dtypes and shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFindings:
    """The findings about one packed layer.

    Attributes:
        problems: A sentence for each fault.
        comparison: None if codes are missing, or unusable.
        sharding_errors: The relative error of the sharded weight, for each sharding; infinite without usable codes.
    """

    problems: Sequence[str]
    comparison: WeightComparison | None
    sharding_errors: Sequence[float]


class PackedLayers:
    """The packed layers of a candidate, to be checked in any order, from any thread.

    Args:
        source: The checkpoint that was quantized.
        candidate: Its codes.
        shardings: The shardings to simulate.

    Attributes:
        form: The format of the codes, unless a layer has another.
        all_linears: The linear layers of the decoder, in the order of the forward pass.
        linears: Those among them that should have codes, or have them.
        expected: The tensors that the candidate should have.

    Raises:
        CheckpointRefused: The candidate is not GPTQ with 4 or 8 bits.
    """

    def __init__(self, source: Checkpoint, candidate: Checkpoint, shardings: Sequence[Sharding] = ()) -> None:
        self.form = gptq_format(candidate.config)
        self._candidate, self._shardings = candidate, shardings
        self._found: dict[str, LayerFindings] = {}
        self.all_linears = decoder_linears(source)
        forms = {linear.module: _form_of(candidate, linear.module, self.form) for linear in self.all_linears}
        self._forms = {module: form for module, form in forms.items() if form}
        self.linears = [linear for linear in self.all_linears if linear.module in self._forms]
        matrices = sharded_matrices(source) if shardings else {}
        self._matrices = {module: matrix for module, matrix in matrices.items() if module in self._forms}
        self.expected: Expected = dict(self._iter_expected(source))

    def has_codes(self, linear: Linear) -> bool:
        """Return whether the candidate has a layer's codes, in the right dtypes and shapes."""
        return agree(self._candidate, self.expected, codes_of(linear))

    def check(self, linear: Linear, source: Checkpoint, candidate: Checkpoint) -> None:
        """Check a layer; the checkpoints may be the tensors of one decoder layer that are in memory, on any device."""
        self._found[linear.module] = self._findings(linear, source, candidate)

    def check_all(
        self, linears: Iterable[Linear], source: Checkpoint, candidate: Checkpoint, *, tick: Callable[[], None]
    ) -> None:
        """Read and check layers on all cores; ``tick`` is called from time to time."""
        map_ordered(linears, lambda linear: self.check(linear, source, candidate), tick=tick)

    @property
    def findings(self) -> dict[Linear, LayerFindings]:
        """The findings about the layers that were checked, in the order of the forward pass."""
        return {linear: self._found[linear.module] for linear in self.linears if linear.module in self._found}

    @property
    def sharding_findings(self) -> list[ShardingFindings]:
        """The findings about each sharding."""
        errors: list[dict[str, float]] = [{} for _ in self._shardings]
        for linear, found in self.findings.items():
            for own, error in zip(errors, found.sharding_errors, strict=False):
                if error:
                    own[linear.module] = error
        return [
            ShardingFindings(cut=sharding, compared=len(self._matrices), errors=own)
            for sharding, own in zip(self._shardings, errors, strict=True)
        ]

    def _findings(self, linear: Linear, source: Checkpoint, candidate: Checkpoint) -> LayerFindings:
        matrix = self._matrices.get(linear.module)
        unusable = [inf] * len(self._shardings) if matrix else []
        if not self.has_codes(linear):
            return LayerFindings(problems=[], comparison=None, sharding_errors=unusable)
        packed = self.form.load(candidate, linear.module)
        problems = list(_code_problems(linear, packed))
        if packed.g_idx.min() < 0 or packed.g_idx.max() >= len(packed.scales):
            problems.append(f"{linear.module}.g_idx has indices of groups that do not exist.")
            return LayerFindings(problems=problems, comparison=None, sharding_errors=unusable)
        comparison = compare_weight(source, linear, packed)
        return LayerFindings(
            problems=problems or list(_weight_problems(comparison)),
            comparison=comparison,
            sharding_errors=sharding_errors(packed, candidate.config, matrix, self._shardings) if matrix else [],
        )

    def _iter_expected(self, source: Checkpoint) -> Iterator[tuple[str, tuple[TensorSpec, ...]]]:
        modules, weights = {linear.module for linear in self.linears}, {linear.tensor for linear in self.linears}
        for name, spec in source.items():
            if name in weights:
                continue
            is_bias = name.rpartition(".")[0] in modules
            yield name, (spec, TensorSpec(dtype="F16", shape=spec.shape)) if is_bias else (spec,)
        for linear in self.linears:
            for code, spec in self._forms[linear.module].code_specs(linear.out_features, linear.in_features).items():
                yield f"{linear.module}.{code}", (spec,)


def codes_of(linear: Linear) -> list[str]:
    """Return the names of a layer's code tensors."""
    return [f"{linear.module}.{code}" for code in CODES]


def agree(candidate: Checkpoint, expected: Expected, names: Iterable[str]) -> bool:
    """Return whether a checkpoint has tensors in allowed dtypes and shapes."""
    return all(name in candidate and candidate[name] in expected[name] for name in names)


def _form_of(candidate: Checkpoint, module: str, form: GptqFormat) -> GptqFormat | None:
    """Return the format that is declared for a layer's codes; that of codes that exist although none are declared."""
    declared = declared_format(candidate.config["quantization_config"], module, form)
    return form.of(candidate, module) if not declared and f"{module}.qweight" in candidate else declared


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
    inputs = torch.arange(linear.in_features, dtype=torch.int32, device=packed.g_idx.device)
    in_order = inputs // form.inputs_per_group(linear.in_features)
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
