"""Divergence of models of which one unit alone has codes, measured in one pass over the layers.

A model that differs from the reference in one layer has the reference's hidden states before it: its stream begins
there. Layers after it are the reference's, so that each layer is read once for all models. What is held are the hidden
states of the models that have begun; if those of all would exceed a budget, there are several passes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.allocation.units import Unit, composed
from qwen_pipeline.evaluation.logits.divergence import Predictions
from qwen_pipeline.layerwise.forward import LayerStream, product
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.layerwise.weights import ModelWeights, fill
from qwen_pipeline.progress import Observe, Progress, unobserved

HIDDEN_BYTES = 2 * 2**30
"""Bytes of hidden states that one pass holds."""
TOGETHER = 8
"""Parts whose logits for a block of the vocabulary are held at a time, beside the reference's."""
REFERENCE = "reference"


class Part(NamedTuple):
    """A model whose unit of this number has the codes of a candidate; all of its other weights are the reference's."""

    unit: int
    word: str


def divergences_of_parts(
    source: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    units: Sequence[Unit],
    windows: Sequence[Tensor],
    context: ComputeContext,
    *,
    observe: Observe = unobserved,
) -> dict[Part, float]:
    """Return the mean KL(reference || part) in nats per token for each unit and candidate.

    Args:
        source: The reference, in full precision.
        candidates: Word of a precision -> the checkpoint whose codes have it.
        units: The units, by ascending layer.
        windows: Token ids [T], all of the same length.
        context: Device and dtype of the computation.
        observe: Called for each layer of each pass.
    """
    parts = [Part(number, word) for number in range(len(units)) for word in candidates]
    batches = torch.stack(list(windows)).to(context.device).split(1)
    stream = LayerStream(source, batches, context)
    each = sum(hidden.nbytes for hidden in stream.hidden)
    size = max(len(candidates), HIDDEN_BYTES // each)
    chunks = [parts[first : first + size] for first in range(0, len(parts), size)]
    found: dict[Part, float] = {}
    for number, chunk in enumerate(chunks):
        stream = LayerStream(source, batches, context, other_models=len(chunk)) if number else stream
        run = _Pass(source, candidates, units, stream)
        for layer in run.layers(chunk):
            done = number * len(stream.parts) + layer + 1
            observe(Progress(task="measure parts", done=done, total=len(chunks) * len(stream.parts), unit="layers"))
        found |= run.divergences(batches)
    return found


class _Pass:
    """One pass over the layers, with the reference and the parts that have begun."""

    def __init__(
        self, source: Checkpoint, candidates: Mapping[str, Checkpoint], units: Sequence[Unit], stream: LayerStream
    ) -> None:
        self._source, self._candidates, self._units, self._stream = source, candidates, units, stream
        self._hidden: dict[Part, list[Tensor]] = {}

    @torch.inference_mode()
    def layers(self, parts: Sequence[Part]) -> Iterator[int]:
        """Run the layers; yield the number of each."""
        for layer, module in enumerate(self._stream.iter_layers()):
            for hidden in self._hidden.values():
                for own, output in zip(hidden, self._outputs(layer, module, hidden), strict=True):
                    own.copy_(output)
            begun = [part for part in parts if self._units[part.unit].layer == layer]
            for part in begun:
                outputs = self._outputs(layer, self._layer_of(part, layer), self._stream.hidden)
                self._hidden[part] = [self._stream.context.offload(output, copies=len(parts)) for output in outputs]
            self._stream.run(layer, module)
            yield layer

    def _outputs(self, layer: int, module: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        for states, arguments in zip(hidden, self._stream.arguments(layer), strict=True):
            yield module(self._stream.context.fetch(states), **arguments)

    def _layer_of(self, part: Part, layer: int) -> nn.Module:
        """Return a layer in which one unit's weights are dequantized codes."""
        unit, context = self._units[part.unit], self._stream.context
        checkpoint = composed(self._source, self._candidates, [unit], [part.word])
        weights = ModelWeights(checkpoint=checkpoint, prefix=self._stream.weights.prefix)
        on_meta = self._stream.meta_model.layers[layer]
        parameters = weights.part(f"layers.{layer}", on_meta).load(device=context.device, dtype=context.dtype)
        return fill(on_meta, parameters)

    @torch.inference_mode()
    def divergences(self, batches: Sequence[Tensor]) -> dict[Part, float]:
        """Return the mean KL of each part; all parts have the reference's output head, which is read once."""
        stream, parts = self._stream, list(self._hidden)
        inputs = {part: self._head_inputs(batches, hidden) for part, hidden in self._hidden.items()}
        reference = self._head_inputs(batches, stream.hidden)
        self._hidden.clear()
        groups = [parts[first : first + TOGETHER] for first in range(0, len(parts), TOGETHER)]
        predictions = [[_predictions(batch, group) for group in groups] for batch in batches]
        head = stream.weights.checkpoint.tensors[stream.weights.head]
        ranges = list(block_ranges(head.spec))
        blocks = stream.context.load_each([head.part(*rows_of) for rows_of in ranges])
        for (start, _), rows_VH in zip(ranges, blocks, strict=True):
            for number, of_batch in enumerate(predictions):
                expected = product(reference[number], rows_VH)
                for group, found in zip(groups, of_batch, strict=True):
                    values = {_role(part): product(inputs[part][number], rows_VH) for part in group}
                    found.update(start, {REFERENCE: expected, **values})
        by_part = {part: group for group, of in enumerate(groups) for part in of}
        return {
            part: torch.cat([of_batch[group].kl(_role(part)) for of_batch in predictions]).mean().item()
            for part, group in by_part.items()
        }

    def _head_inputs(self, batches: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the output head for each batch, [N, H]; the last position predicts nothing."""
        stream = self._stream
        return [
            stream.meta_model.head_inputs(batch, stream.context.fetch(states))[:, :-1].flatten(0, 1)
            for batch, states in zip(batches, hidden, strict=True)
        ]


def _role(part: Part) -> str:
    return f"{part.unit} {part.word}"


def _predictions(batch: Tensor, parts: Sequence[Part]) -> Predictions:
    roles = list(map(_role, parts))
    return Predictions(batch[:, 1:].flatten(), roles=[REFERENCE, *roles], reference=REFERENCE, compared=roles)
