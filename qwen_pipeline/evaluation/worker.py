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

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.evaluation.behaviour.reply import reply
from qwen_pipeline.evaluation.computed_padding import ComputedPadding, computed_padding
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, PADDED, QUANTIZED
from qwen_pipeline.evaluation.loading import fault_of, place_tensors
from qwen_pipeline.evaluation.logits.streamed import NOTHING, activation_peaks, evaluate
from qwen_pipeline.evaluation.measured import Measured
from qwen_pipeline.evaluation.measurement import Measurement, sharding_role
from qwen_pipeline.evaluation.quantized_codes import QuantizedCodes
from qwen_pipeline.evaluation.tensor_parallel.find import shardings_with_effect
from qwen_pipeline.evaluation.tensor_parallel.findings import ShardingFindings
from qwen_pipeline.evaluation.tensor_parallel.simulate import diverge
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.qwen.heads import head_kind


def measure(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run a :class:`Measurement`; return a :class:`Measured`, both as JSON values.

    Every layer is read once for predictions, activations and, on a GPU, the comparison of weights.

    Raises:
        EnvironmentFault: This environment lacks the packages that Transformers needs to load GPTQ.
    """
    measurement = Measurement.from_json(spec)
    if any(_has_codes(Path(root)) for root in measurement.models.values()):
        _require_loaders()
    context = ComputeContext(device=torch.device(measurement.device), dtype=torch.float32)
    models = {role: open_model(Path(root)) for role, root in measurement.models.items()}
    padding = _computed_padding(measurement, models, context)
    models |= {PADDED: padding.checkpoint} if padding else {}
    figures = {role: _placed(role, root, observe) for role, root in measurement.models.items()}
    loaded = {role: model for role, model in models.items() if not figures[role].fault}
    codes = QuantizedCodes.of(measurement, models, observe) if measurement.structure else None
    alike = {role: model for role, model in loaded.items() if head_kind(model) == measurement.task.kind}
    calibration = list(map(torch.tensor, measurement.calibration)) if QUANTIZED in loaded else []
    outputs = list[torch.Tensor]()
    if measurement.reference in alike:
        in_passing = replace(codes.in_passing(alike, context) if codes else NOTHING, take_outputs=outputs.append)
        if calibration and QUANTIZED in alike:
            in_passing = replace(in_passing, tokens={QUANTIZED: calibration})
        if padding and PADDED in alike and MERGED in alike:
            in_passing = in_passing.computing(PADDED, MERGED, padding.compute)
        measured = evaluate(
            alike,
            [torch.tensor(window) for window in measurement.windows],
            reference=measurement.reference,
            compared=[role for role in measurement.compared if role in alike],
            context=context,
            task=measurement.task,
            in_passing=in_passing,
            observe=observe,
        )
        figures |= {
            role: replace(found, unplaced=figures[role].unplaced, linears=figures[role].linears)
            for role, found in measured.items()
        }
    if calibration and not figures[QUANTIZED].calibration_peaks:
        peaks = activation_peaks(loaded[QUANTIZED], calibration, context, observe=observe)
        figures[QUANTIZED] = replace(figures[QUANTIZED], calibration_peaks=peaks)
    answering = {role: loaded[role] for role in measurement.answering if role in loaded}
    for role, answer in _answered(answering, measurement, context, observe).items():
        figures[role] = replace(figures[role], **answer)
    if not codes:
        return Measured(figures=figures).to_json()
    structure, shardings = codes.findings(context)
    if measurement.task.kind == "language" and not figures[QUANTIZED].fault:
        figures |= _sharded(models[QUANTIZED], shardings, torch.tensor(measurement.windows[0]), context)
    rows = [row for each in outputs for row in each[: measurement.outputs].tolist()]
    return Measured(figures=figures, structure=structure, shardings=shardings, outputs=rows).to_json()


def _computed_padding(
    measurement: Measurement, models: Mapping[str, Checkpoint], context: ComputeContext
) -> ComputedPadding | None:
    """Return the padded model as it is computed from the merged one, if a GPU has the layers of that in its memory."""
    if not context.has_own_memory or not {MERGED, PADDED} <= models.keys():
        return None
    roots = {role: Path(root) for role, root in measurement.models.items()}
    return computed_padding(models[MERGED], roots[MERGED], models[PADDED], roots[PADDED])


def _sharded(
    candidate: Checkpoint, shardings: Sequence[ShardingFindings], window: torch.Tensor, context: ComputeContext
) -> dict[str, ModelFigures]:
    effective = shardings_with_effect(candidate, shardings)
    figures = diverge(candidate, list(effective.values()), [window], context)
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
    """Generate answers; the reference comes last and uses the other model's answers, and further tokens, as drafts.

    Any error is a finding, since the other figures are valid without answers.
    """
    found: dict[str, dict[str, Any]] = {}
    drafts: Sequence[Sequence[int]] = ()
    replies: Sequence[Sequence[int]] = ()
    proposer: Decoder | None = None
    for role in sorted(models, key=lambda role: role == measurement.reference):
        try:
            rules, decoder = GreedyRules.of(models[role]), Decoder(models[role], context)
            decode = partial(
                decoder.answers,
                measurement.prompts,
                stops=rules.stops,
                limit=measurement.max_new_tokens,
                proposer=proposer,
                observe=lambda progress, role=role: observe(replace(progress, task=f"{role} answers")),
            )
            drafts = decode(drafts=drafts, rules=rules)
            found[role] = {"answers": tuple(drafts), "unapplied": rules.unapplied}
            if measurement.unruled and rules:
                found[role] |= {"unruled_answers": tuple(decode(drafts=drafts))}
            replied = reply(decoder, measurement, rules, drafts=replies, proposer=proposer, observe=observe)
            found[role] |= replied
            replies = replied.get("replies", ())
            proposer = decoder if decoder.is_compact else None
        except Exception as error:
            found[role] = {"unanswered": fault_of(error), "unreplied": fault_of(error)}
    return found


def _has_codes(root: Path) -> bool:
    """Return whether Transformers needs GPTQModel to load a model."""
    return (open_model(root).config.get("quantization_config") or {}).get("quant_method") == "gptq"


def _require_loaders() -> None:
    try:
        import gptqmodel  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        import optimum.gptq  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise EnvironmentFault(
            f"This environment cannot load GPTQ checkpoints: {error}.",
            remedy="Install the engine: qwen-pipeline engine install gptqmodel",
        ) from error
