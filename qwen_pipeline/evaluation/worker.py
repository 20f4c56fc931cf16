"""The worker that measures checkpoints. It runs under the Python of an engine's environment.

Transformers itself checks from headers alone whether a checkpoint is complete. All other figures, including answers,
come from a streamed forward pass, which needs the memory of one layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.evaluation.figures import ModelFigures, dump_figures
from qwen_pipeline.evaluation.findings import QUANTIZED
from qwen_pipeline.evaluation.loading import fault_of, place_tensors
from qwen_pipeline.evaluation.logits.streamed import activation_peaks, evaluate
from qwen_pipeline.evaluation.measurement import Measurement, sharding_role
from qwen_pipeline.evaluation.tensor_parallel.simulate import diverge
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.qwen.heads import head_kind


def measure(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run a :class:`Measurement`; return role -> :class:`ModelFigures`, both as JSON values.

    Raises:
        EnvironmentFault: This environment lacks the packages that Transformers needs to load GPTQ.
    """
    _require_loaders()
    measurement = Measurement.from_json(spec)
    figures = {role: _placed(role, root, observe) for role, root in measurement.models.items()}
    loaded = {role: open_model(Path(measurement.models[role])) for role, found in figures.items() if not found.fault}
    context = ComputeContext(device=torch.device(measurement.device), dtype=torch.float32)
    alike = {role: model for role, model in loaded.items() if head_kind(model) == measurement.task.kind}
    if measurement.reference in alike:
        measured = evaluate(
            alike,
            [torch.tensor(window) for window in measurement.windows],
            reference=measurement.reference,
            compared=[role for role in measurement.compared if role in alike],
            context=context,
            task=measurement.task,
            observe=observe,
        )
        figures |= {
            role: replace(found, unplaced=figures[role].unplaced, linears=figures[role].linears)
            for role, found in measured.items()
        }
    if measurement.calibration and QUANTIZED in loaded:
        windows = list(map(torch.tensor, measurement.calibration))
        peaks = activation_peaks(loaded[QUANTIZED], windows, context, observe=observe)
        figures[QUANTIZED] = replace(figures[QUANTIZED], calibration_peaks=peaks)
    answering = {role: loaded[role] for role in measurement.answering if role in loaded}
    for role, answer in _answered(answering, measurement, context, observe).items():
        figures[role] = replace(figures[role], **answer)
    if measurement.shardings and measurement.task.kind == "language" and not figures[QUANTIZED].fault:
        figures |= _sharded(measurement, context)
    return dump_figures(figures)


def _sharded(measurement: Measurement, context: ComputeContext) -> dict[str, ModelFigures]:
    window = torch.tensor(measurement.windows[0])
    figures = diverge(open_checkpoint(Path(measurement.models[QUANTIZED])), measurement.shardings, [window], context)
    return {sharding_role(number): found for number, found in enumerate(figures)}


def _placed(role: str, root: str, observe: Observe) -> ModelFigures:
    """Let Transformers assign the tensors of a model."""
    observe(Progress(task=f"load {role}", done=0, total=1))
    placement = place_tensors(Path(root))
    observe(Progress(task=f"load {role}", done=1, total=1))
    return ModelFigures(fault=placement.fault, unplaced=placement.unplaced, linears=placement.linears)


def _answered(
    models: Mapping[str, Checkpoint], measurement: Measurement, context: ComputeContext, observe: Observe
) -> dict[str, dict[str, Any]]:
    """Generate answers; the reference comes last and uses the other model's answers as drafts.

    Any error is a finding, since the other figures are valid without answers.
    """
    found: dict[str, dict[str, Any]] = {}
    drafts: Sequence[Sequence[int]] = ()
    for role in sorted(models, key=lambda role: role == measurement.reference):
        try:
            rules = GreedyRules.of(models[role])
            decode = partial(
                Decoder(models[role], context).answers,
                measurement.prompts,
                stops=rules.stops,
                limit=measurement.max_new_tokens,
                observe=lambda progress, role=role: observe(replace(progress, task=f"{role} answers")),
            )
            drafts = decode(drafts=drafts, rules=rules)
            found[role] = {"answers": tuple(drafts), "unapplied": rules.unapplied}
            if measurement.unruled and rules:
                found[role] |= {"unruled_answers": tuple(decode(drafts=drafts))}
        except Exception as error:
            found[role] = {"unanswered": fault_of(error)}
    return found


def _require_loaders() -> None:
    try:
        import gptqmodel  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        import optimum.gptq  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise EnvironmentFault(
            f"This environment cannot load GPTQ checkpoints: {error}.",
            remedy="Install the engine: qwen-pipeline engine install gptqmodel",
        ) from error
