"""The cheapest padding and group size with which a model serves on given engines and tensor-parallel degrees."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config, declares_tied, require_family, text_config
from qwen_pipeline.qwen.geometry import PadPlan, plan_padding, resized_config, with_towers
from qwen_pipeline.qwen.layers import Matrix, layer_matrices, number_of_layers, required
from qwen_pipeline.qwen.methods import layout_of
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec, Targets, served_degrees
from qwen_pipeline.qwen.precision import KEPT, ModuleRules, Precision, PrecisionAt
from qwen_pipeline.qwen.tensor_parallel.engines import (
    VERDICTS,
    ServingPrediction,
    ShardingVerdict,
    predict_serving,
    worst_of,
)
from qwen_pipeline.qwen.tensor_parallel.floats import float_padding_for

BITS = 4
GROUP_SIZES = (128, 64, 32)
SERVES: tuple[ShardingVerdict, ...] = ("ok", "padded at load")

USUAL_ENGINE = "vllm"
"""The engine to plan for where none is requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to make a model servable.

    Attributes:
        name: Such as ``groups of 128, padded``.
        group_size: Group size of the quantization.
        plan: The padding.
        config: The config after padding.
        degrees: Requested tensor-parallel degrees, ascending.
        predictions: One for each engine and degree.
        weights: Extra quantized weights, as a fraction of those of the unpadded model.
        rank_bytes: Bytes of weights on each rank at the highest degree.
        flops: Extra multiplications per token, as a fraction.
    """

    name: str
    group_size: int
    plan: PadPlan
    config: Config
    degrees: tuple[int, ...]
    predictions: tuple[ServingPrediction, ...]
    weights: float
    rank_bytes: int
    flops: float

    @property
    def verdict(self) -> ShardingVerdict:
        """The worst verdict of all engines and degrees."""
        return worst_of(prediction.verdict for prediction in self.predictions)

    @property
    def serves(self) -> bool:
        """Return whether every engine serves correctly at every degree."""
        return self.verdict in SERVES

    @property
    def obstacle(self) -> str:
        """The first engine and degree that fail, with the reason; empty if it serves."""
        return _first_obstacle(self.predictions)


Words = Mapping[str, str]
"""Pattern -> word of a precision: see :class:`~qwen_pipeline.qwen.precision.ModuleRules`."""
NO_WORDS: Words = {}


def options(
    config: Config, targets: Targets, *, group_sizes: Sequence[int] = GROUP_SIZES, words: Words = NO_WORDS
) -> list[Option]:
    """Return the ways to serve a model on these engines at all of their degrees, the best first.

    Each group size is considered without padding, padded to whole groups, and padded to the smallest widths that all
    degrees can share. Options that serve come first, by bytes per rank, then by descending group size. Modules that
    ``words`` name have their own precision in each option.

    Raises:
        InputRefused: The family or an engine is unknown, the config lacks a size, or ``targets`` lacks a degree.
    """
    degrees = served_degrees(targets)
    found = [
        _option(config, plan, name, targets, words)
        for group_size in group_sizes
        for name, plan in _plans(config, group_size, lcm(*degrees)).items()
    ]
    return sorted(
        found,
        key=lambda option: (
            not option.serves and VERDICTS.index(option.verdict),
            option.rank_bytes,
            -option.group_size,
        ),
    )


def fewer_ranks(
    config: Config, targets: Targets, *, group_sizes: Sequence[int] = GROUP_SIZES, words: Words = NO_WORDS
) -> list[Option]:
    """Return the best option at the highest lower degree that has one, and the best one without padding."""
    highest = served_degrees(targets)[-1]
    found: list[Option] = []
    for degree in (degree for degree in range(highest - 1, 0, -1) if highest % degree == 0):
        lower = {
            engine: sorted({min(degree, requested) for requested in degrees}) for engine, degrees in targets.items()
        }
        serving = [option for option in options(config, lower, group_sizes=group_sizes, words=words) if option.serves]
        unpadded = [option for option in serving if not option.plan.changes]
        found += serving[:1] if not found else []
        if unpadded:
            return found if unpadded[0] in found else [*found, unpadded[0]]
    return found


def plan_for(config: Config, spec: PaddingSpec) -> PadPlan:
    """Return the padding of a spec.

    Raises:
        InputRefused: The family cannot be padded, or the model serves on the targets with no padding.
    """
    if spec.targets and spec.method != "gptq":
        plan = float_padding_for(config, spec.targets, layout_of(spec.method), padding_layout=spec.layout)
    elif spec.targets:
        plan = padding_for(config, spec.targets, group_size=spec.group_size, layout=spec.layout)
    else:
        plan = plan_padding(
            config, group_size=spec.group_size, tensor_parallel=spec.tensor_parallel, layout=spec.layout
        )
    return with_towers(plan, config, ranks=spec.ranks) if spec.towers else plan


def padding_for(config: Config, targets: Targets, *, group_size: int, layout: Layout = DEFAULT_LAYOUT) -> PadPlan:
    """Return the smallest padding with which a model, quantized in groups of ``group_size``, serves on all targets.

    Raises:
        InputRefused: No padding suffices; the remedy names the group sizes or degrees that do.
    """
    best = next(option for option in options(config, targets, group_sizes=[group_size]) if _is_whole(option.plan))
    if best.serves:
        ranks = best.plan.tensor_parallel
        return plan_padding(config, group_size=group_size, tensor_parallel=ranks, layout=layout)
    raise InputRefused(
        f"With groups of {group_size}, no padding makes the model serve on {best.obstacle}.",
        remedy=_alternatives(config, targets),
    )


def obstacle_of(config: Config, targets: Targets, *, group_size: int, precision_at: PrecisionAt | None = None) -> str:
    """Return the first target that an unpadded model fails on, with the reason; empty if it serves on all of them."""
    own = precision_at or declared_at(config, group_size, NO_WORDS)
    return _first_obstacle(_predictions(config, targets, group_size, own))


def declared_at(config: Config, group_size: int, words: Words) -> PrecisionAt:
    """Return the precisions of a model with 4 bits in groups of ``group_size``, except for what ``words`` name."""
    rules = ModuleRules(default=Precision(bits=BITS, group_size=group_size), words=words)
    rules.require_valid()
    return rules.at(require_family(config).decoder[0])


def quantized_bytes(config: Config, group_size: int, words: Words = NO_WORDS) -> int:
    """Return the bytes of a model's weights after quantization: codes, scales, and weights that stay in 16 bits."""
    precision_at = declared_at(config, group_size, words)
    embeddings = required(config, "vocab_size") * required(config, "hidden_size") * (1 if declares_tied(config) else 2)
    return 2 * embeddings + sum(
        (precision_at(layer, matrix.kinds()[0]) if matrix.quantized else KEPT).nbytes(
            matrix.out_features, matrix.in_features
        )
        * matrix.count
        for layer in range(number_of_layers(config))
        for matrix in layer_matrices(config, layer)
    )


def _plans(config: Config, group_size: int, ranks: int) -> dict[str, PadPlan]:
    """Return option name -> padding for the paddings that differ, the smallest first."""
    unpadded = plan_padding(config, group_size=1, tensor_parallel=1)
    sizes = tuple(replace(size, group_size=group_size) for size in unpadded.sizes)
    plans = [("unpadded", replace(unpadded, group_size=group_size, sizes=sizes))]
    for name, shared_by in (("padded to whole groups", 1), ("padded", ranks)):
        plan = plan_padding(config, group_size=group_size, tensor_parallel=shared_by)
        plans += [(name, plan)] if _widths(plan) != _widths(plans[-1][1]) else []
    return {f"groups of {group_size}, {name}": plan for name, plan in plans}


def _widths(plan: PadPlan) -> list[int]:
    return [size.padded for size in plan.sizes]


def _is_whole(plan: PadPlan) -> bool:
    return all(width % plan.group_size == 0 for width in _widths(plan))


def _option(config: Config, plan: PadPlan, name: str, targets: Targets, words: Words) -> Option:
    wide, group_size, degrees = config, plan.group_size, served_degrees(targets)
    for size in plan.sizes:
        wide = resized_config(wide, size, size.padded)
    return Option(
        name=name,
        group_size=group_size,
        plan=plan,
        config=wide,
        degrees=tuple(degrees),
        predictions=tuple(_predictions(wide, targets, group_size, declared_at(wide, group_size, words))),
        weights=weight_count(wide) / weight_count(config) - 1,
        rank_bytes=quantized_bytes(wide, group_size, words) // degrees[-1],
        flops=multiplications(wide) / multiplications(config) - 1,
    )


def _predictions(
    config: Config, targets: Targets, group_size: int, precision_at: PrecisionAt
) -> Iterator[ServingPrediction]:
    for engine, degrees in targets.items():
        for degree in degrees:
            yield predict_serving(config, engine, group_size=group_size, degree=degree, precision_at=precision_at)


def _first_obstacle(predictions: Iterable[ServingPrediction]) -> str:
    failing = next((prediction for prediction in predictions if prediction.verdict not in SERVES), None)
    return f"{failing.engine} at TP {failing.degree}: {'; '.join(failing.reasons[:1])}" if failing else ""


def _alternatives(config: Config, targets: Targets) -> str:
    serving = [option for option in options(config, targets) if option.serves] or fewer_ranks(config, targets)
    named = [f"TP {', '.join(map(str, option.degrees))} with {option.name}" for option in serving]
    return f"Use {', or '.join(dict.fromkeys(named))}." if named else "Choose other engines or degrees."


def _counted(config: Config) -> list[tuple[Matrix, int]]:
    """Return each kind of matrix with the number of its layers."""
    counts: dict[Matrix, int] = {}
    for layer in range(number_of_layers(config)):
        for matrix in layer_matrices(config, layer):
            counts[matrix] = counts.get(matrix, 0) + 1
    return list(counts.items())


def weight_count(config: Config) -> int:
    """Return the number of weights that quantization turns into codes."""
    return sum(m.out_features * m.in_features * m.count * n for m, n in _counted(config) if m.quantized)


def multiplications(config: Config) -> int:
    """Return the multiplications per token in the decoder's matrices; only the chosen ones of routed experts run."""
    chosen = int(text_config(config).get("num_experts_per_tok") or 1)
    return sum(m.out_features * m.in_features * (chosen if "*" in m.kind else m.count) * n for m, n in _counted(config))
