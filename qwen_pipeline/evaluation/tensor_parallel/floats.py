"""Check a checkpoint of 8-bit floats against its target engines.

Loaders give each rank a share of the codes and of the scales. If no block is divided, each weight keeps its own scale,
so that ranks compute with the unsharded weights by construction; divided blocks are refused. No engine was found that
loads them with other scales, as engines do with groups of integer codes, so nothing needs to be simulated.
"""

from collections.abc import Sequence

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.tensor_parallel.findings import ANY_ENGINE, OF_FLOATS, Target, TargetFindings
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.methods import Fp8Layout
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility, assess_degrees
from qwen_pipeline.qwen.tensor_parallel.floats import divided_blocks, predict_float_serving
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.transforms.codes.fp8 import fp8_format


def find_float_targets(config: Config, targets: Sequence[Target]) -> list[TargetFindings]:
    """Return the verdict for each target.

    Raises:
        CheckpointRefused: The layout of the 8-bit floats is unknown.
        InputRefused: The engine of a target is unknown.
    """
    layout = fp8_format(config["quantization_config"]).layout
    return [_findings(config, layout, target) for target in targets]


def assess_float_targets(config: Config, degree: int, targets: Sequence[Target]) -> DegreeFeasibility | None:
    """Return the feasibility of the targets' highest degree, or else of ``degree``; None if the layout is unknown."""
    try:
        layout = fp8_format(config["quantization_config"]).layout
        highest = max([target.degree for target in targets] or [degree])
        (found,) = assess_degrees(config, group_size=layout.block or 1, degrees=[highest])
        requested = targets or [Target(engine=ANY_ENGINE, degree=degree)]
        obstacles = [
            f"{row.kernel} at TP {row.target.degree}: {'; '.join(row.reasons)}"
            for target in requested
            if (row := _findings(config, layout, target)).refuses
        ]
        obstacles += [each for t in targets for each in tower_obstacles(config, {t.engine: [t.degree]})]
    except PipelineError:
        return None
    sentence = f"Cannot serve: {' '.join(obstacles)}." if obstacles else "Every rank holds whole blocks and heads."
    return DegreeFeasibility(degree=found.degree, sizes=found.sizes, legal=not obstacles, sentence=sentence)


def _findings(config: Config, layout: Fp8Layout, target: Target) -> TargetFindings:
    kernel = f"{target.engine} with {OF_FLOATS}"
    if target.engine == ANY_ENGINE:
        reasons = tuple(divided_blocks(config, layout, degree=target.degree))
        verdict = "refused" if reasons else "ok"
        return TargetFindings(target=target, kernel=kernel, verdict=verdict, reasons=reasons, found=None)
    predicted = predict_float_serving(config, target.engine, layout, degree=target.degree)
    return TargetFindings(
        target=target, kernel=kernel, verdict=predicted.verdict, reasons=predicted.reasons, found=None
    )
