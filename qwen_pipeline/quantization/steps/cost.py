"""Seconds that each recipe takes on a machine, scaled from measured layers by the products that it computes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qwen_pipeline.quantization.recipes import RECIPES, LearnedRounding, RecipeName
from qwen_pipeline.quantization.spec import Device, QuantSpec
from qwen_pipeline.qwen.families import Config, number_of_experts, text_config
from qwen_pipeline.qwen.layers import Matrix, layer_matrices, number_of_layers

_LAST = ("o_proj", "out_proj", "down_proj")
"""Matrices that share their inputs with no other, and that add to the residual stream."""
FORWARD_PASSES = 1.5
"""Forward passes of a layer by the loop over one model; a recipe that compares models runs two."""
EVALUATIONS = 4
"""Forward passes of a layer by learned rounding, beside those of its steps: before, after, and once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Measured seconds of a layer.

    Attributes:
        source: Publication of the measurement.
        matrices: The quantized matrices of the layer.
        tokens: Calibration tokens.
        seconds: Recipe -> seconds; of one core if the device is a CPU.
        rate: Multiply-adds a second of a product on the device: in float32 of one core, in bfloat16 of a GPU.
        column: Seconds for each column that GPTQModel's solver rounds, whatever its length: what launching the kernels
            takes. On a GPU it decides the time of mixtures, and comes from one
            (benchmarks/results/layerwise-experts-h200.md). The kernel of the other recipes is launched once a block.
    """

    source: str
    matrices: Sequence[Matrix]
    tokens: int
    seconds: Mapping[RecipeName, float]
    rate: float
    seq_len: int
    column: float = 0.0


def _dense(hidden: int, kv: int, intermediate: int) -> list[Matrix]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return [Matrix(kind=kind, out_features=o, in_features=i, split="whole") for kind, (o, i) in shapes.items()]


REFERENCES: Mapping[Device, Reference] = {
    "cuda": Reference(
        source="one H200, 72B widths, docs/performance.md",
        matrices=_dense(8192, 1024, 29696),
        tokens=128 * 2048,
        seconds={"gptq": 6.16, "fast": 6.02},
        rate=394e12,
        seq_len=2048,
        column=26e-6,
    ),
    "cpu": Reference(
        source="a core of an AMD EPYC with AVX2, SmolLM2-135M, docs/numerics.md",
        matrices=_dense(576, 192, 1600),
        tokens=16 * 512,
        seconds={"gptq": 182 / 30, "fast": 301 / 30},
        rate=28e9,
        seq_len=512,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeCost:
    """The estimated seconds of a recipe.

    Attributes:
        measured: Whether the recipe itself was measured on such a device; else what it adds to one that was is scaled
            by its products.
    """

    recipe: RecipeName
    seconds: float
    measured: bool


def recipe_costs(config: Config, spec: QuantSpec, *, rate: float, cores: int) -> list[RecipeCost]:
    """Estimate the seconds of quantizing a model by each recipe.

    Args:
        config: The model's config.
        spec: Calibration tokens and device.
        rate: Multiply-adds a second on this machine, as :class:`Reference` has them.
        cores: Cores of a CPU in use.

    Raises:
        InputRefused: The family is unknown, or the config lacks a size.
    """
    reference, tokens = REFERENCES[spec.device], spec.samples * spec.seq_len
    speed = rate / reference.rate * (cores if spec.device == "cpu" else 1)
    share = _share_of_experts(config)
    layers = [
        [matrix for matrix in layer_matrices(config, layer) if matrix.quantized]
        for layer in range(number_of_layers(config))
    ]
    mixture = any(matrix.count > 1 for matrices in layers for matrix in matrices)
    found: list[RecipeCost] = []
    for name in RECIPES:
        per_product = _seconds_a_product(name, reference)
        work = sum(products(name, matrices, tokens, spec.seq_len, share) for matrices in layers)
        rounded = sum(map(_columns, layers)) if name == "gptq" else 0
        found.append(
            RecipeCost(
                recipe=name,
                seconds=per_product * work / speed + reference.column * rounded,
                measured=name in reference.seconds and (name == "gptq" or not mixture),
            )
        )
    return found


def _seconds_a_product(name: RecipeName, reference: Reference) -> float:
    """Return the seconds of a multiply-add; of a recipe that was not measured, those of the last one that was."""
    known = name if name in reference.seconds else list(reference.seconds)[-1]
    work = products(known, reference.matrices, reference.tokens, reference.seq_len, 1)
    launching = reference.column * _columns(reference.matrices) if known == "gptq" else 0.0
    return (reference.seconds[known] - launching) / work


def _columns(matrices: Sequence[Matrix]) -> int:
    """Return the number of columns that are rounded one by one in a layer."""
    groups = {_inputs_of(matrix): matrix for matrix in matrices}
    return sum(matrix.count * matrix.in_features for matrix in groups.values())


def products(name: RecipeName, matrices: Sequence[Matrix], tokens: int, seq_len: int, share: float) -> float:
    """Return the multiply-adds of a recipe in one layer.

    Args:
        name: The recipe.
        matrices: The quantized matrices of the layer.
        tokens: Calibration tokens.
        seq_len: Tokens of a window.
        share: Share of the tokens that reach an expert.
    """
    recipe = RECIPES[name]
    total, forward = 0.0, sum(_forward(each, share) for each in matrices)
    total += FORWARD_PASSES * (2 if recipe.compares_models else 1) * tokens * forward
    for (kind, inputs), group in groupby(matrices, key=_inputs_of):
        members = list(group)
        outputs, count = sum(each.out_features for each in members), members[0].count
        reached = tokens * (share if count > 1 else 1)
        once = reached * inputs**2 / 2 + inputs**3 * 2 / 3 + outputs * inputs**2 / 2
        if recipe.target_correction:
            once += reached * inputs**2 + 3 * outputs * inputs**2
            once += reached * outputs * inputs if kind.endswith(_LAST) and count == 1 else 0
        total += count * once
    if learning := recipe.learned_rounding:
        total += (_learned_tokens(learning, seq_len) * 3 + EVALUATIONS * tokens) * forward
    return total


def _learned_tokens(learning: LearnedRounding, seq_len: int) -> int:
    return learning.steps * learning.windows * seq_len


def _forward(matrix: Matrix, share: float) -> float:
    return matrix.count * matrix.out_features * matrix.in_features * (share if matrix.count > 1 else 1)


def _inputs_of(matrix: Matrix) -> tuple[str, int]:
    """Return a key that matrices with the same inputs share."""
    module, _, name = matrix.kind.rpartition(".")
    return matrix.kind if name in _LAST else module, matrix.in_features


def _share_of_experts(config: Config) -> float:
    experts = number_of_experts(config)
    return int(text_config(config).get("num_experts_per_tok") or 1) / experts if experts else 1.0


def machine_rate(device: Device) -> float:
    """Measure multiply-adds a second: of one core in float32, of a GPU in bfloat16; a tenth of a second."""
    return _gpu_rate() if device == "cuda" else _core_rate()


def _core_rate(size: int = 768, rounds: int = 3) -> float:
    """Return the best of some rounds by processor time, however many threads share the product."""
    import numpy as np

    one: Any = np.random.default_rng(0).random((size, size), dtype=np.float32)
    np.matmul(one, one)
    used: list[float] = []
    for _ in range(rounds):
        started = time.process_time()
        np.matmul(one, one)
        used.append(time.process_time() - started)
    return size**3 / max(min(used), 1e-6)


def _gpu_rate(size: int = 8192, rounds: int = 5) -> float:
    import torch

    one = torch.ones(size, size, device="cuda", dtype=torch.bfloat16)
    torch.matmul(one, one)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        torch.matmul(one, one)
    torch.cuda.synchronize()
    return rounds * size**3 / (time.perf_counter() - started)
