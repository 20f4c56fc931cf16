"""Check a checkpoint against its target engines: the engines' rules, and the weights that their ranks compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.evaluation.tensor_parallel.findings import (
    ANY_ENGINE,
    ShardedModules,
    Sharding,
    Target,
    TargetFindings,
)
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import head_obstacles
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


def find_targets(
    source: Checkpoint, candidate: Checkpoint, targets: Sequence[Target], *, observe: Observe = unobserved
) -> list[TargetFindings]:
    """Check a quantized checkpoint against each target; each distinct sharding is simulated once.

    Args:
        source: The checkpoint that was quantized, which determines the layers.
        candidate: Its codes, whose shapes must be those of ``source``.
        targets: The engines and degrees that will serve it.
        observe: Called for each layer.

    Raises:
        CheckpointRefused: The candidate is not GPTQ with 4 or 8 bits.
        InputRefused: The engine of a target is unknown.
    """
    from qwen_pipeline.evaluation.tensor_parallel.simulate import compare_shardings  # computes, so it needs torch

    form = gptq_format(candidate.config)
    rows: list[tuple[TargetFindings, Sharding | None]] = []
    for target in targets:
        for kernel in _kernels(target.engine):
            verdict, reasons = _rules(candidate.config, form, kernel, target.degree)
            row = TargetFindings(target=target, kernel=kernel, verdict=verdict, reasons=reasons, found=None)
            rows.append((row, None if row.refuses else _sharding_of(kernel, target.degree)))
    shardings = list(dict.fromkeys(sharding for _, sharding in rows if sharding))
    found = dict(zip(shardings, compare_shardings(source, candidate, form, shardings, observe=observe), strict=True))
    return [replace(row, found=found[sharding] if sharding else None) for row, sharding in rows]


def shardings_with_effect(candidate: Checkpoint, found: Sequence[TargetFindings]) -> dict[Sharding, ShardedModules]:
    """Return the modules of each sharding that changes weights, unless its ranks lack inputs or scales."""
    size = gptq_format(candidate.config).group_size if found else 0
    errors_of = {row.found.cut: row.found.errors for row in found if row.found and row.found.errors}

    def is_runnable(sharding: Sharding, errors: Mapping[str, float]) -> bool:
        if not all(map(isfinite, errors.values())):
            return False
        inputs = [candidate[f"{module}.g_idx"].rows for module in errors]
        return all(not i % sharding.ranks and i // sharding.ranks >= size for i in inputs)

    return {
        sharding: (sharding.ranks, sorted(errors))
        for sharding, errors in errors_of.items()
        if is_runnable(sharding, errors)
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
        group_size = max(gptq_format(config).group_size, 1)
        (found,) = assess_degrees(
            config, group_size=group_size, degrees=[max([target.degree for target in targets] or [degree])]
        )
        requested = [{target.engine: [target.degree]} for target in targets]
        obstacles = [obstacle_of(config, each, group_size=group_size) for each in requested]
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
    predicted = predict_serving(config, kernel, group_size=form.group_size, degree=degree)
    if form.bits == 4 and form.sym and not form.desc_act:
        return predicted.verdict, predicted.reasons
    unknown = "its rules are known for 4 bits, symmetric, without act-order only"
    return worst_of([predicted.verdict, "unknown"]), (*predicted.reasons, unknown)


def _sharding_of(kernel: str, degree: int) -> Sharding | None:
    rules = SERVING_ENGINES.get(kernel)
    if rules is None:
        return Sharding(ranks=degree)
    if degree == 1 and not rules.parallel:
        return None
    return Sharding(ranks=degree, pads_mlps=rules.pads_mlps and degree > 1, halves_groups=rules.halves_groups)
