"""Check a checkpoint against its target engines: the engines' rules, and the weights that their ranks compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.evaluation.tensor_parallel.findings import (
    ANY_ENGINE,
    ShardedModules,
    Sharding,
    ShardingFindings,
    Target,
    TargetFindings,
)
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import head_obstacles
from qwen_pipeline.qwen.precision import Precision, PrecisionAt
from qwen_pipeline.qwen.tensor_parallel.engines import (
    SERVING_ENGINES,
    ShardingVerdict,
    kernels_of,
    predict_serving,
    worst_of,
)
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility, assess_degrees
from qwen_pipeline.qwen.tensor_parallel.plan import obstacle_of
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.transforms.codes.gptq import GptqFormat, gptq_format
from qwen_pipeline.transforms.codes.module_rules import declared_format

PlannedTarget = tuple[TargetFindings, Sharding | None]
"""A kernel of a target judged by its rules, and the sharding to simulate; None if the kernel refuses the checkpoint."""


def plan_targets(candidate: Config, targets: Sequence[Target]) -> list[PlannedTarget]:
    """Judge a quantized checkpoint's config by the rules of each target.

    Raises:
        CheckpointRefused: The candidate is not GPTQ with 4 or 8 bits.
        InputRefused: The engine of a target is unknown.
    """
    form = gptq_format(candidate)
    rows: list[PlannedTarget] = []
    for target in targets:
        for kernel in _kernels(target.engine):
            verdict, reasons = _rules(candidate, form, kernel, target.degree)
            row = TargetFindings(target=target, kernel=kernel, verdict=verdict, reasons=reasons, found=None)
            rows.append((row, None if row.refuses else _sharding_of(kernel, target.degree)))
    return rows


def shardings_of(planned: Sequence[PlannedTarget]) -> list[Sharding]:
    """Return the distinct shardings to simulate."""
    return list(dict.fromkeys(sharding for _, sharding in planned if sharding))


def simulated_targets(planned: Sequence[PlannedTarget], simulated: Sequence[ShardingFindings]) -> list[TargetFindings]:
    """Return the findings for each target, with those of its sharding."""
    found = {each.cut: each for each in simulated}
    return [replace(row, found=found[sharding] if sharding else None) for row, sharding in planned]


def shardings_with_effect(candidate: Checkpoint, found: Sequence[ShardingFindings]) -> dict[Sharding, ShardedModules]:
    """Return the modules of each sharding that changes weights, unless its ranks lack inputs or scales."""

    def is_runnable(sharding: Sharding, errors: Mapping[str, float]) -> bool:
        if not all(map(isfinite, errors.values())):
            return False
        form = gptq_format(candidate.config)
        inputs = {module: candidate[f"{module}.g_idx"].rows for module in errors}
        sizes = {module: form.of(candidate, module).group_size for module in errors}
        return all(not i % sharding.ranks and i // sharding.ranks >= sizes[module] for module, i in inputs.items())

    return {
        each.cut: (each.cut.ranks, sorted(each.errors))
        for each in found
        if each.errors and is_runnable(each.cut, each.errors)
    }


def with_divergences(
    found: Sequence[TargetFindings], divergences: Mapping[Sharding, DivergenceFigures | None]
) -> list[TargetFindings]:
    """Return the findings with the measured divergence of each sharding."""
    return [
        replace(row, found=replace(row.found, divergence=divergences.get(row.found.cut))) if row.found else row
        for row in found
    ]


def assess_targets(config: Config, degree: int, targets: Sequence[Target]) -> DegreeFeasibility | None:
    """Return the feasibility of the targets' highest degree, or else of ``degree``; None if the config has no codes.

    Some engines can share groups that others cannot, so declared targets take precedence.
    """
    try:
        form = gptq_format(config)
        group_size = max(form.group_size, 1)
        (found,) = assess_degrees(
            config, group_size=group_size, degrees=[max([target.degree for target in targets] or [degree])]
        )
        requested = [{target.engine: [target.degree]} for target in targets]
        declared = _declared_at(config, replace(form, group_size=group_size))
        obstacles = [obstacle_of(config, each, group_size=group_size, precision_at=declared) for each in requested]
        of_towers = [obstacle for each in requested for obstacle in tower_obstacles(config, each)]
    except PipelineError:
        return None
    if not targets:
        return found
    if refusals := "; ".join(filter(None, obstacles)):
        return replace(found, legal=False, sentence=" ".join([f"Cannot be served by {refusals}.", *of_towers]))
    if of_towers:
        return replace(found, sizes=(), legal=False, sentence=" ".join(of_towers))
    return replace(found, sizes=(), legal=True, sentence="Every target engine serves at every requested degree.")


def _kernels(engine: str) -> list[str]:
    return [engine] if engine == ANY_ENGINE else kernels_of(engine)


def _rules(config: Config, form: GptqFormat, kernel: str, degree: int) -> tuple[ShardingVerdict, tuple[str, ...]]:
    if kernel == ANY_ENGINE:
        obstacles = tuple(head_obstacles(config, degree))
        return ("refused", obstacles) if obstacles else ("ok", ())
    predicted = predict_serving(
        config,
        kernel,
        group_size=form.group_size,
        degree=degree,
        bits=form.bits,
        precision_at=_declared_at(config, form),
    )
    if form.sym and not form.desc_act:
        return predicted.verdict, predicted.reasons
    unknown = "its rules are known for symmetric codes without act-order only"
    return worst_of([predicted.verdict, "unknown"]), (*predicted.reasons, unknown)


def _declared_at(config: Config, form: GptqFormat) -> PrecisionAt:
    """Return the precisions that a config declares."""
    settings: Mapping[str, Any] = config["quantization_config"]

    def precision_at(layer: int, kind: str) -> Precision:
        own = declared_format(settings, f"model.layers.{layer}.{kind}", form)
        return Precision(bits=own.bits, group_size=own.group_size) if own else Precision()

    return precision_at


def _sharding_of(kernel: str, degree: int) -> Sharding | None:
    rules = SERVING_ENGINES.get(kernel)
    if rules is None:
        return Sharding(ranks=degree)
    if degree == 1 and not rules.parallel:
        return None
    return Sharding(ranks=degree, pads_mlps=rules.pads_mlps and degree > 1, halves_groups=rules.halves_groups)
