"""Rules of serving engines, as data, for tensor-parallel checkpoints of 8-bit floats, and the padding that they need.

A rank holds a share of the outputs of a column-parallel layer and of the inputs of a row-parallel one. With a scale for
each output, any share will do. Blocks of 128 x 128 cannot be divided: engines refuse a share that is not a multiple of
128 (https://github.com/vllm-project/vllm/issues/49949, 42516, 54178), whether it is of outputs or of inputs. They check
each of the layers that they join (q, k and v; gate and up), on one rank too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config, declares_tied
from qwen_pipeline.qwen.geometry import PadPlan, head_obstacles, plan_padding, resized_config
from qwen_pipeline.qwen.layers import Matrix, head_geometry, layer_matrices, number_of_layers, required
from qwen_pipeline.qwen.methods import Fp8Layout
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, Targets, served_degrees
from qwen_pipeline.qwen.tensor_parallel.engines import (
    ServingPrediction,
    ShardingVerdict,
    distinct_matrices,
    kernels_of,
    worst_of,
)

SCALE_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatEngine:
    """The rules of one engine for 8-bit floats.

    Attributes:
        source: Where the rules were read.
        divided: Verdict for a share that divides a block.
        unaligned: Verdict for a share of a layer without blocks that is not a multiple of 16.
    """

    source: str
    divided: ShardingVerdict = "refused"
    unaligned: ShardingVerdict = "unknown"


FLOAT_ENGINES: Mapping[str, FloatEngine] = {
    "vllm": FloatEngine(
        source="vLLM fp8_utils.py, validate_fp8_block_shape (issues 42384 and 52997 quote it); for shares of 16"
        " cutlass_scaled_mm, beside which it has a Triton kernel"
    ),
    "sglang": FloatEngine(
        source="SGLang fp8_utils.py, validate_fp8_block_shape; its mixtures of experts refuse divided blocks by the"
        " name of gate and up"
    ),
}
"""Engine -> its rules. An engine that is not here is ``unknown``."""


def predict_float_serving(config: Config, engine: str, layout: Fp8Layout, *, degree: int) -> ServingPrediction:
    """Return the prediction for a checkpoint of 8-bit floats served on ``degree`` ranks.

    Raises:
        InputRefused: The engine or the family is unknown, or the config lacks a size.
    """
    kernels_of(engine)
    rules = FLOAT_ENGINES.get(engine.partition("-")[0])
    findings: list[tuple[ShardingVerdict, str]] = [("refused", each) for each in head_obstacles(config, degree)]
    for share in _shares(config, degree):
        if share.remainder:
            findings.append(("refused", share.undivided))
        elif share.size % layout.unit:
            worst = (rules.divided if layout.block else rules.unaligned) if rules else "unknown"
            findings.append((worst, f"{share}, which is not a multiple of {layout.unit}"))
    if rules is None:
        findings.append(("unknown", "no rules for 8-bit floats were found"))
    return ServingPrediction(
        engine=engine,
        degree=degree,
        group_size=layout.unit,
        verdict="refused" if any(verdict == "refused" for verdict, _ in findings) else worst_of(v for v, _ in findings),
        reasons=tuple(dict.fromkeys(f"{verdict}: {reason}" for verdict, reason in findings)),
    )


def divided_blocks(config: Config, layout: Fp8Layout, *, degree: int) -> list[str]:
    """Return a sentence for each layer of which a rank would hold a part of a block or of a head, whatever the engine.

    A layout without blocks needs only whole channels.
    """
    obstacles = list(head_obstacles(config, degree))
    for share in _shares(config, degree):
        if share.remainder:
            obstacles.append(share.undivided)
        elif layout.block and share.size % layout.block:
            obstacles.append(f"{share}: {share.size / layout.block:g} blocks of {layout.block}")
    return list(dict.fromkeys(obstacles))


def float_padding_for(
    config: Config, targets: Targets, layout: Fp8Layout, *, padding_layout: Layout = DEFAULT_LAYOUT
) -> PadPlan:
    """Return the smallest padding with which a model, rounded to 8-bit floats, serves on all targets.

    Raises:
        InputRefused: No padding suffices: attention divides a block or a head. The remedy names what does.
    """
    plan = plan_padding(
        config, group_size=layout.unit, tensor_parallel=lcm(*served_degrees(targets)), layout=padding_layout
    )
    wide = padded_config(config, plan)
    for engine, degrees in targets.items():
        for degree in degrees:
            predicted = predict_float_serving(wide, engine, layout, degree=degree)
            if predicted.verdict == "refused":
                raise InputRefused(
                    f"As {layout.title}, no padding makes the model serve on {engine} at TP {degree}:"
                    f" {predicted.reasons[0]}.",
                    remedy="Use method 'fp8-dynamic', which has no blocks, or fewer ranks."
                    if layout.block and not head_obstacles(wide, degree)
                    else "Use fewer ranks.",
                )
    return plan


def padded_config(config: Config, plan: PadPlan) -> Config:
    wide = config
    for size in plan.sizes:
        wide = resized_config(wide, size, size.padded)
    return wide


def float_bytes(config: Config, layout: Fp8Layout) -> int:
    """Return the bytes of a model's weights as 8-bit floats: codes, scales, and weights that stay in 16 bits."""
    bits = sum(
        _bits(matrix, layout) for layer in range(number_of_layers(config)) for matrix in layer_matrices(config, layer)
    )
    embeddings = required(config, "vocab_size") * required(config, "hidden_size") * (1 if declares_tied(config) else 2)
    return bits // 8 + 2 * embeddings


def _bits(matrix: Matrix, layout: Fp8Layout) -> int:
    numbers = matrix.out_features * matrix.in_features
    if not matrix.quantized:
        return 16 * numbers * matrix.count
    block = layout.block
    scales = -(-matrix.out_features // block) * -(-matrix.in_features // block) if block else matrix.out_features
    return (8 * numbers + SCALE_BITS * scales) * matrix.count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Channels of a matrix on one rank.

    Attributes:
        remainder: Channels that would be left over.
    """

    kind: str
    side: str
    size: int
    ranks: int
    remainder: int

    def __str__(self) -> str:
        return f"{self.kind} has {self.size} {self.side}{' per rank' if self.ranks > 1 else ''}"

    @property
    def undivided(self) -> str:
        whole = self.size * self.ranks + self.remainder
        return f"{self.kind}: {whole} {self.side} are not divisible by {self.ranks} ranks"


def _shares(config: Config, degree: int) -> Iterator[_Share]:
    """Yield the inputs and the outputs of each matrix on one rank."""
    kv_heads = head_geometry(config)[1]
    for matrix in distinct_matrices(config):
        if not matrix.quantized:
            continue
        is_kv = matrix.kind in ("self_attn.k_proj", "self_attn.v_proj")
        ranks = min(degree, kv_heads) if is_kv else degree  # fewer heads than ranks are replicated
        rows = matrix.split == "rows"
        for side, size, shared_by in (
            ("inputs", matrix.in_features, ranks if rows else 1),
            ("outputs", matrix.out_features, 1 if rows else ranks),
        ):
            yield _Share(
                kind=matrix.kind, side=side, size=size // shared_by, ranks=shared_by, remainder=size % shared_by
            )
