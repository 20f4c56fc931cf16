"""Perplexity, divergence and drift of several models, with one decoder layer of each in memory at a time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, Peak, Stretch
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.logits.activation_range import PeakStream
from qwen_pipeline.evaluation.logits.divergence import Predictions
from qwen_pipeline.evaluation.logits.heads import compare_outputs, head_outputs
from qwen_pipeline.layerwise.forward import LayerStream, advance, logit_blocks
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, Progress, unobserved

LANGUAGE = HeadTask()
EVALUATION_BATCH_TOKENS = {"cpu": 1, "cuda": 8192}
"""Tokens in a batch, by device; at least one window."""
STRETCHES = 32
"""Maximum number of ranges of positions for which the distribution of KL is described."""


def evaluate(
    models: Mapping[str, Checkpoint],
    windows: Sequence[Tensor],
    *,
    reference: str,
    compared: Collection[str],
    context: ComputeContext,
    task: HeadTask = LANGUAGE,
    observe: Observe = unobserved,
) -> dict[str, ModelFigures]:
    """Score every token but the first of each window, and compare each prediction with the reference's.

    Models with another head than a language model's have its outputs compared instead.

    Args:
        models: Role -> checkpoint, full precision or GPTQ codes, all with the same depth and vocabulary.
        windows: Token ids [T], all of the same length.
        reference: The role with which others are compared.
        compared: Roles to compare with the reference.
        context: Device and dtype of the computation.
        task: The task of all of the models.
        observe: Called for each layer.
    """
    batches = _batches(windows, context)
    others = len(models) - 1
    streams = {role: PeakStream(model, batches, context, other_models=others) for role, model in models.items()}
    drift: dict[str, list[float]] = {role: [] for role in models}
    for layer in advance(list(streams.values())):
        for role in compared:
            drift[role].append(_distance(streams[role], streams[reference], context))
        observe(Progress(task="evaluate", done=layer + 1, total=len(streams[reference].parts), unit="layers"))

    measured = (
        _predictions(streams, batches, reference, compared)
        if task.kind == "language"
        else _outputs(streams, batches, reference, compared, task)
    )
    return {
        role: replace(found, drift=tuple(drift[role]), peaks=tuple(streams[role].peaks))
        for role, found in measured.items()
    }


def _predictions(
    streams: Mapping[str, PeakStream], batches: Sequence[Tensor], reference: str, compared: Collection[str]
) -> dict[str, ModelFigures]:
    predictions = [
        Predictions(batch[:, 1:].flatten(), roles=streams, reference=reference, compared=compared) for batch in batches
    ]
    for block in logit_blocks(list(streams.values()), streams[reference].context):
        predictions[block.batch].update(block.first, dict(zip(streams, block.values, strict=True)))
    return {
        role: ModelFigures(
            perplexity=torch.cat([each.nll(role) for each in predictions]).mean().exp().item(),
            tokens=sum(batch[:, 1:].numel() for batch in batches),
            divergence=_divergence(predictions, role, batches[0].shape[1] - 1) if role in compared else None,
        )
        for role in streams
    }


def _outputs(
    streams: Mapping[str, PeakStream],
    batches: Sequence[Tensor],
    reference: str,
    compared: Collection[str],
    task: HeadTask,
) -> dict[str, ModelFigures]:
    outputs = {role: head_outputs(stream, batches, task) for role, stream in streams.items()}
    return {
        role: ModelFigures(
            tokens=sum(batch.numel() for batch in batches),
            head=compare_outputs(found, outputs[reference], task) if role in compared else None,
        )
        for role, found in outputs.items()
    }


def activation_peaks(
    model: Checkpoint, windows: Sequence[Tensor], context: ComputeContext, *, observe: Observe = unobserved
) -> tuple[Peak, ...]:
    """Return the largest activation of each layer; all windows [T] have the same length."""
    stream = PeakStream(model, _batches(windows, context), context)
    for layer in advance([stream]):
        observe(Progress(task="measure activations", done=layer + 1, total=len(stream.parts), unit="layers"))
    return tuple(stream.peaks)


def _batches(windows: Sequence[Tensor], context: ComputeContext) -> Sequence[Tensor]:
    size = max(1, EVALUATION_BATCH_TOKENS[context.device.type] // len(windows[0]))
    return torch.stack(list(windows)).to(context.device).split(size)


def _divergence(predictions: Sequence[Predictions], role: str, positions: int) -> DivergenceFigures:
    kl_N = torch.cat([each.kl(role) for each in predictions])
    return DivergenceFigures(
        mean=kl_N.mean().item(),
        p95=kl_N.quantile(0.95).item(),
        p99_9=kl_N.quantile(0.999).item(),
        max=kl_N.max().item(),
        by_position=tuple(kl_N.view(-1, positions).mean(dim=0).tolist()),
        stretches=_stretches(kl_N.view(-1, positions)),
        top1_agreement=torch.cat([each.agrees(role) for each in predictions]).double().mean().item(),
    )


def _stretches(kl_WT: Tensor) -> tuple[Stretch, ...]:
    """Return the distribution of KL along the context, in up to :data:`STRETCHES` ranges of about equal length."""
    parts = kl_WT.tensor_split(min(STRETCHES, kl_WT.shape[1]), dim=1)
    firsts = accumulate((part.shape[1] for part in parts[:-1]), initial=0)
    return tuple(
        Stretch(
            first=first,
            mean=part.mean().item(),
            median=part.quantile(0.5).item(),
            p95=part.quantile(0.95).item(),
        )
        for first, part in zip(firsts, parts, strict=True)
    )


def _distance(stream: LayerStream, reference: LayerStream, context: ComputeContext) -> float:
    """Return ``||h - h'|| / ||h'||`` over all tokens; sums are float32 in a batch, float64 over batches."""
    squares = torch.zeros(2, dtype=torch.float64, device=context.device)
    for own, other in zip(stream.hidden, reference.hidden, strict=True):
        h, h_reference = context.fetch(own).float(), context.fetch(other).float()
        squares += torch.stack([(h - h_reference).square().sum(), h_reference.square().sum()])
    difference, norm = squares.sqrt().tolist()
    return difference / norm if norm else 0.0
