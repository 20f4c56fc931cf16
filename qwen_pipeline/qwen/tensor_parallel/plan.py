"""Choosing a padding and a group size by what they cost, for the engines and degrees that will serve a model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config, declares_tied, text_config
from qwen_pipeline.qwen.geometry import PadPlan, plan_padding, resized_config, with_towers
from qwen_pipeline.qwen.layers import Matrix, layer_matrices, number_of_layers, required
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec, Targets, served_degrees
from qwen_pipeline.qwen.tensor_parallel.engines import (
    VERDICTS,
    ServingPrediction,
    ShardingVerdict,
    predict_serving,
    worst_of,
)

BITS = 4
SCALE_BITS = 16 + BITS
"""A float16 scale and a zero point for each group of inputs of each output."""
GROUP_SIZES = (128, 64, 32)
SERVES: tuple[ShardingVerdict, ...] = ("ok", "padded at load")

USUAL_ENGINE = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to make a model servable.

    Attributes:
        name: Such as ``groups of 128, padded``.
        group_size: Of the quantization.
        plan: What padding would do.
        config: The config after it.
        degrees: Tensor-parallel degrees that were asked about, rising.
        servings: What each engine does at each degree.
        weights: Extra quantized weights, as a fraction of those of the unpadded model.
        rank_bytes: Bytes of weights on each rank at the highest degree.
        flops: Extra multiplications for a token, as a fraction.
    """

    name: str
    group_size: int
    plan: PadPlan
    config: Config
    degrees: tuple[int, ...]
    servings: tuple[ServingPrediction, ...]
    weights: float
    rank_bytes: int
    flops: float

    @property
    def verdict(self) -> ShardingVerdict:
        """The worst of what the engines do."""
        return worst_of(at.verdict for at in self.servings)

    @property
    def serves(self) -> bool:
        return self.verdict in SERVES

    @property
    def obstacle(self) -> str:
        """Where it fails first and why, in words; empty where it serves."""
        return _first_obstacle(self.servings)


def options(config: Config, targets: Targets, *, group_sizes: Sequence[int] = GROUP_SIZES) -> list[Option]:
    """Return the ways to serve a model on these engines at all of their degrees, the best first.

    Each group size is considered as the model is, padded to whole groups, and padded to the smallest widths that all
    degrees can share. Those that serve come first, by bytes on a rank, then by the size of their groups.

    Raises:
        InputRefused: The family or an engine is unknown, the config lacks a size, or no degree or engine is named.
    """
    degrees = served_degrees(targets)
    found = [
        _option(config, plan, name, targets)
        for group_size in group_sizes
        for name, plan in _plans(config, group_size, lcm(*degrees)).items()
    ]
    return sorted(found, key=lambda at: (not at.serves and VERDICTS.index(at.verdict), at.rank_bytes, -at.group_size))


def fewer_ranks(config: Config, targets: Targets, *, group_sizes: Sequence[int] = GROUP_SIZES) -> list[Option]:
    """Return the best option at the highest lower degree that has one, and the best of those that pad nothing."""
    highest = served_degrees(targets)[-1]
    found: list[Option] = []
    for degree in (degree for degree in range(highest - 1, 0, -1) if highest % degree == 0):
        lower = {engine: sorted({min(degree, asked) for asked in degrees}) for engine, degrees in targets.items()}
        serving_ones = [at for at in options(config, lower, group_sizes=group_sizes) if at.serves]
        unpadded = [at for at in serving_ones if not at.plan.changes]
        found += serving_ones[:1] if not found else []
        if unpadded:
            return found if unpadded[0] in found else [*found, unpadded[0]]
    return found


def plan_for(config: Config, spec: PaddingSpec) -> PadPlan:
    """Return the padding that a spec asks for.

    Raises:
        InputRefused: The family cannot be padded, or no padding lets the targets serve.
    """
    if spec.targets:
        plan = padding_for(config, spec.targets, group_size=spec.group_size, layout=spec.layout)
    else:
        plan = plan_padding(
            config, group_size=spec.group_size, tensor_parallel=spec.tensor_parallel, layout=spec.layout
        )
    return with_towers(plan, config, ranks=spec.ranks) if spec.towers else plan


def padding_for(config: Config, targets: Targets, *, group_size: int, layout: Layout = DEFAULT_LAYOUT) -> PadPlan:
    """Return the least padding after which a model, quantized in groups of ``group_size``, serves on all targets.

    Raises:
        InputRefused: None does; the remedy says which group size or degree would.
    """
    wholly = (at for at in options(config, targets, group_sizes=[group_size]) if _is_whole(at.plan))
    best = next(wholly)
    if best.serves:
        ranks = best.plan.tensor_parallel
        return plan_padding(config, group_size=group_size, tensor_parallel=ranks, layout=layout)
    raise InputRefused(
        f"Quantized in groups of {group_size}, however padded, the model does not serve on {best.obstacle}.",
        remedy=_other_ways(config, targets),
    )


def obstacle_of(config: Config, targets: Targets, *, group_size: int) -> str:
    """Return where a model as it is fails first and why, in words; empty where it serves on all targets."""
    return _first_obstacle(_servings(config, targets, group_size))


def quantized_bytes(config: Config, group_size: int) -> int:
    """Return the bytes of a model's weights after quantization: codes, scales, and what stays in 16 bits."""
    bits = sum(_bits(matrix, group_size) * layers for matrix, layers in _counted(config))
    embeddings = required(config, "vocab_size") * required(config, "hidden_size") * (1 if declares_tied(config) else 2)
    return bits // 8 + 2 * embeddings


def _bits(matrix: Matrix, group_size: int) -> int:
    numbers = matrix.out_features * matrix.in_features * matrix.count
    return numbers * BITS + numbers * SCALE_BITS // group_size if matrix.quantized else numbers * 16


def _plans(config: Config, group_size: int, ranks: int) -> dict[str, PadPlan]:
    """Return the paddings that differ, the least first, by what an option with them is called."""
    as_it_is = plan_padding(config, group_size=1, tensor_parallel=1)
    sizes = tuple(replace(size, group_size=group_size) for size in as_it_is.sizes)
    plans = [("as it is", replace(as_it_is, group_size=group_size, sizes=sizes))]
    for name, shared_by in (("padded to whole groups", 1), ("padded", ranks)):
        plan = plan_padding(config, group_size=group_size, tensor_parallel=shared_by)
        plans += [(name, plan)] if _widths(plan) != _widths(plans[-1][1]) else []
    return {f"groups of {group_size}, {name}": plan for name, plan in plans}


def _widths(plan: PadPlan) -> list[int]:
    return [size.padded for size in plan.sizes]


def _is_whole(plan: PadPlan) -> bool:
    return all(width % plan.group_size == 0 for width in _widths(plan))


def _option(config: Config, plan: PadPlan, name: str, targets: Targets) -> Option:
    wide, group_size, degrees = config, plan.group_size, served_degrees(targets)
    for size in plan.sizes:
        wide = resized_config(wide, size, size.padded)
    return Option(
        name=name,
        group_size=group_size,
        plan=plan,
        config=wide,
        degrees=tuple(degrees),
        servings=tuple(_servings(wide, targets, group_size)),
        weights=_weights(wide) / _weights(config) - 1,
        rank_bytes=quantized_bytes(wide, group_size) // degrees[-1],
        flops=_flops(wide) / _flops(config) - 1,
    )


def _servings(config: Config, targets: Targets, group_size: int) -> Iterator[ServingPrediction]:
    for engine, degrees in targets.items():
        for degree in degrees:
            yield predict_serving(config, engine, group_size=group_size, degree=degree)


def _first_obstacle(servings: Iterable[ServingPrediction]) -> str:
    failing = next((at for at in servings if at.verdict not in SERVES), None)
    return f"{failing.engine} at TP {failing.degree}: {'; '.join(failing.reasons[:1])}" if failing else ""


def _other_ways(config: Config, targets: Targets) -> str:
    ways: Iterable[Option] = [at for at in options(config, targets) if at.serves] or fewer_ranks(config, targets)
    named = [f"TP {', '.join(map(str, at.degrees))} with {at.name}" for at in ways]
    return f"What serves: {'; '.join(dict.fromkeys(named))}." if named else "Name other engines or degrees."


def _counted(config: Config) -> list[tuple[Matrix, int]]:
    """Return each kind of matrix with the number of layers that have it."""
    counts: dict[Matrix, int] = {}
    for layer in range(number_of_layers(config)):
        for matrix in layer_matrices(config, layer):
            counts[matrix] = counts.get(matrix, 0) + 1
    return list(counts.items())


def _weights(config: Config) -> int:
    return sum(m.out_features * m.in_features * m.count * n for m, n in _counted(config) if m.quantized)


def _flops(config: Config) -> int:
    """Return the multiplications of one token in the decoder's matrices; of routed experts only the chosen ones run."""
    chosen = int(text_config(config).get("num_experts_per_tok") or 1)
    return sum(m.out_features * m.in_features * (chosen if "*" in m.kind else m.count) * n for m, n in _counted(config))
