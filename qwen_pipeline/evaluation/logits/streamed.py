"""Perplexity, divergence and drift of several models, with one decoder layer of each in memory at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, Peak, Stretch
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.logits.activation_range import PeakStream
from qwen_pipeline.evaluation.logits.divergence import Predictions
from qwen_pipeline.evaluation.logits.drafts import draft_acceptance
from qwen_pipeline.evaluation.logits.heads import compare_outputs, head_outputs
from qwen_pipeline.layerwise.forward import LayerStream, advance, logit_blocks
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.layerwise.weights import Take
from qwen_pipeline.progress import Observe, Progress, unobserved

Stored = Mapping[str, Tensor]
"""Tensors of one decoder layer as they are stored, by name, on the device of the computation."""
LANGUAGE = HeadTask()
EVALUATION_BATCH_TOKENS = {"cpu": 1, "cuda": 8192}
"""Tokens in a batch, by device; at least one window."""
STRETCHES = 32
"""Maximum number of ranges of positions for which the distribution of KL is described."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InPassing:
    """Further measurements for which layers are read anyway.

    Attributes:
        tokens: Role -> windows [T] on which the activations of a model are measured too.
        keeping: Roles whose stored tensors of a layer are kept until all models have passed it.
        use: Called then with the layer's number, and role -> tensors.
        computed: Role -> the role, one of ``keeping``, from whose tensors of a layer its own are computed, and a
            function that does it, given these tensors and a name.
        take_outputs: Called with the outputs [N, D] of the reference, float64, if its head is not a language model's.
    """

    tokens: Mapping[str, Sequence[Tensor]] = field(default_factory=dict[str, Sequence[Tensor]])
    keeping: Collection[str] = ()
    use: Callable[[int, Mapping[str, Stored]], None] = lambda *_: None
    computed: Mapping[str, tuple[str, Callable[[Stored, str], Tensor]]] = field(
        default_factory=dict[str, tuple[str, Callable[[Mapping[str, Tensor], str], Tensor]]]
    )
    take_outputs: Callable[[Tensor], object] = lambda _: None

    def computing(self, role: str, source: str, compute: Callable[[Stored, str], Tensor]) -> "InPassing":
        """Return this, with the tensors of a model computed from those of another."""
        return replace(
            self,
            keeping=list(dict.fromkeys([*self.keeping, source])),
            computed={**self.computed, role: (source, compute)},
        )


NOTHING = InPassing()


def evaluate(
    models: Mapping[str, Checkpoint],
    windows: Sequence[Tensor],
    *,
    reference: str,
    compared: Collection[str],
    context: ComputeContext,
    task: HeadTask = LANGUAGE,
    in_passing: InPassing = NOTHING,
    observe: Observe = unobserved,
) -> dict[str, ModelFigures]:
    """Score every token but the first of each window, and compare each prediction with the reference's.

    Models with another head than a language model's have its outputs compared instead. The drafts of a draft head are
    compared with the model's own predictions.

    Args:
        models: Role -> checkpoint, full precision or GPTQ codes, all with the same depth and vocabulary.
        windows: Token ids [T], all of the same length.
        reference: The role with which others are compared.
        compared: Roles to compare with the reference.
        context: Device and dtype of the computation.
        task: The task of all of the models.
        in_passing: Further measurements, for which nothing more is read.
        observe: Called for each layer.
    """
    batches = _batches(windows, context)
    others = len(models) - 1 + len(in_passing.tokens)
    streams = {role: PeakStream(model, batches, context, other_models=others) for role, model in models.items()}
    beside: dict[LayerStream, PeakStream] = {
        streams[role]: PeakStream(models[role], _batches(tokens, context), context, other_models=others)
        for role, tokens in in_passing.tokens.items()
    }
    drift: dict[str, list[float]] = {role: [] for role in models}
    _share_tensors(streams, in_passing)
    for layer in advance(list(streams.values()), beside):
        in_passing.use(layer, {role: streams[role].pop_kept() for role in in_passing.keeping})
        for role in compared:
            drift[role].append(_distance(streams[role], streams[reference], context))
        observe(Progress(task="evaluate", done=layer + 1, total=len(streams[reference].parts), unit="layers"))

    language = task.kind == "language"
    accepted = {role: draft_acceptance(stream, batches) if language else None for role, stream in streams.items()}
    measured = (
        _predictions(streams, batches, reference, compared)
        if language
        else _outputs(streams, batches, reference, compared, task, in_passing.take_outputs)
    )
    return {
        role: replace(
            found,
            drift=tuple(drift[role]),
            peaks=tuple(streams[role].peaks),
            draft_acceptance=accepted[role],
            computed_from=in_passing.computed[role][0] if role in in_passing.computed else None,
            calibration_peaks=tuple(beside[streams[role]].peaks) if role in in_passing.tokens else (),
        )
        for role, found in measured.items()
    }


def _share_tensors(streams: Mapping[str, PeakStream], in_passing: InPassing) -> None:
    """Let models keep the tensors of their layers, and compute theirs from what others keep."""
    for role in in_passing.keeping:
        streams[role].kept = {}
    for role, (source, compute) in in_passing.computed.items():
        streams[role].take = _computing(compute, streams[source])


def _computing(compute: Callable[[Stored, str], Tensor], source: PeakStream) -> Take:
    return lambda name: compute(source.kept or {}, name)


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
    take_outputs: Callable[[Tensor], object],
) -> dict[str, ModelFigures]:
    outputs = {role: head_outputs(stream, batches, task) for role, stream in streams.items()}
    take_outputs(outputs[reference])
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
