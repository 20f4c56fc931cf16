"""Choosing a padding and a group size by what they cost, for the engines and degrees that will serve a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config, text_config
from qwen_pipeline.qwen.geometry import PadPlan, plan_padding, resized_config
from qwen_pipeline.qwen.layers import Matrix, layer_matrices, number_of_layers, required
from qwen_pipeline.qwen.serving import VERDICTS, Serving, Verdict, serving, worst_of

BITS = 4
SCALE_BITS = 16 + BITS
"""A float16 scale and a zero point for each group of inputs of each output."""
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to make a model servable.

    Attributes:
        name: Such as ``groups of 128, padded``.
        group_size: Of the quantization.
        plan: What padding would do.
        degrees: Tensor-parallel degrees that were asked about.
        servings: What each engine does at each degree.
        weights: Extra quantized weights, as a fraction of those of the unpadded model.
        rank_bytes: Bytes of weights on each rank at the highest degree.
        flops: Extra multiplications for a token, as a fraction.
    """

    name: str
    group_size: int
    plan: PadPlan
    degrees: tuple[int, ...]
    servings: tuple[Serving, ...]
    weights: float
    rank_bytes: int
    flops: float

    @property
    def verdict(self) -> Verdict:
        """The worst of what the engines do."""
        return worst_of(at.verdict for at in self.servings)


def options(
    config: Config, *, engines: Sequence[str], degrees: Sequence[int], group_sizes: Sequence[int] = GROUP_SIZES
) -> list[Option]:
    """Return the ways to serve a model on these engines at all of these degrees, the best first.

    Each group size is considered as the model is and, where that changes anything, padded to the smallest widths that
    all degrees can share. Better is a better verdict, then fewer bytes on a rank, then larger groups.

    Raises:
        InputRefused: The family is unknown, the config lacks a size, or no degree or engine is named.
    """
    if not degrees or not engines:
        raise InputRefused("No degree or no engine is named.", remedy="Name at least one of each.")
    found: list[Option] = []
    for group_size in group_sizes:
        padded = plan_padding(config, group_size=group_size, tensor_parallel=lcm(*degrees))
        found.append(
            _option(config, plan_padding(config, group_size=1, tensor_parallel=1), group_size, engines, degrees)
        )
        found += [_option(config, padded, group_size, engines, degrees)] if padded.changes else []
    return sorted(found, key=lambda at: (VERDICTS.index(at.verdict), at.rank_bytes, -at.group_size))


def legal_degree(config: Config, *, engines: Sequence[str], group_size: int, below: int) -> int | None:
    """Return the highest power of two below a degree at which all engines serve the model as it is; None if none."""
    degree = 1 << (below - 1).bit_length() >> 1
    while degree >= 1:
        verdicts = {serving(config, engine, group_size=group_size, degree=degree).verdict for engine in engines}
        if verdicts <= {"ok", "padded at load"} and degree < below:
            return degree
        degree //= 2
    return None


def quantized_bytes(config: Config, group_size: int) -> int:
    """Return the bytes of a model's weights after quantization: codes, scales, and what stays in 16 bits."""
    bits = sum(_bits(matrix, group_size) * layers for matrix, layers in _counted(config))
    tied = bool(config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False)))
    embeddings = required(config, "vocab_size") * required(config, "hidden_size") * (1 if tied else 2)
    return bits // 8 + 2 * embeddings


def _bits(matrix: Matrix, group_size: int) -> int:
    numbers = matrix.out_features * matrix.in_features * matrix.count
    return numbers * BITS + numbers * SCALE_BITS // group_size if matrix.quantized else numbers * 16


def _option(config: Config, plan: PadPlan, group_size: int, engines: Sequence[str], degrees: Sequence[int]) -> Option:
    wide = config
    for size in plan.sizes:
        wide = resized_config(wide, size, size.padded)
    name = f"groups of {group_size}, " + ("padded" if plan.changes else "as it is")
    return Option(
        name=name,
        group_size=group_size,
        plan=plan,
        degrees=tuple(degrees),
        servings=tuple(
            serving(wide, engine, group_size=group_size, degree=degree) for engine in engines for degree in degrees
        ),
        weights=_weights(wide) / _weights(config) - 1,
        rank_bytes=quantized_bytes(wide, group_size) // max(degrees),
        flops=_flops(wide) / _flops(config) - 1,
    )


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
