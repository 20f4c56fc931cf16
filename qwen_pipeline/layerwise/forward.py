"""Forward passes of many batches through one or several models, with one decoder layer in memory at a time.

For each layer: read it (the following ones are read meanwhile), run every batch through it, free it. The hidden states
of all batches are kept, the weights are not. A model is read once, and memory does not depend on the number of layers.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.layerwise.meta_model import Arguments
from qwen_pipeline.layerwise.model import ComputeContext, LayeredModel, iter_modules

_NONE: Mapping["LayerStream", "LayerStream"] = {}


class _CapturedError(Exception):
    """Ends a layer's forward pass once a value is captured: the arguments of a module, or its return value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _CachedOutputs(nn.Module):
    """Replaces a module that need not compute again: returns its output for each batch, in the batches' order.

    Args:
        outputs: For each batch, the one tensor that the module returned.
        returned: A return value of the module, a tensor or a tuple with one; the values of its tensors are ignored.
        context: Device and dtype of the computation.
    """

    def __init__(self, outputs: Sequence[Tensor], returned: Any, context: ComputeContext) -> None:
        super().__init__()
        self._outputs, self._returned, self._context, self._calls = outputs, returned, context, 0

    def forward(self, *_: Any, **__: Any) -> Any:
        output = self._outputs[self._calls % len(self._outputs)]
        self._calls += 1
        return _map_tensors(lambda _: self._context.fetch(output), self._returned)


class LayerStream(LayeredModel):
    """Hidden states of batches that pass through the layers of one model.

    Args:
        checkpoint: Full precision, GPTQ codes or 8-bit floats, of any Qwen family.
        batches: Token ids [B, T].
        context: Device and dtype of the computation.
        other_models: Number of other models whose hidden states are held at the same time.

    Attributes:
        context: Device and dtype of the computation.
        hidden: For each batch, [B, T, H]: the input of the first layer, then the output of the last layer that was run.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Tensor], context: ComputeContext, *, other_models: int = 0
    ) -> None:
        super().__init__(checkpoint, context)
        self._batches, self._copies = batches, len(batches) * (1 + other_models)
        self.hidden: list[Tensor] = []
        self._arguments: list[Sequence[Arguments]] = []
        with self.meta_model.holding_rows(batches):
            for batch in batches:
                inputs = self.meta_model.layer_inputs(batch)
                self.hidden.append(context.offload(inputs.hidden, copies=self._copies))
                self._arguments.append(_deduplicated(inputs.arguments, self._arguments[0] if self._arguments else ()))

    @torch.inference_mode()
    def run(self, layer: int, module: nn.Module) -> None:
        """Run every batch through a layer, and replace its hidden states."""
        for hidden, output in zip(self.hidden, self.outputs(layer, module), strict=True):
            hidden.copy_(output, non_blocking=True)

    def arguments(self, layer: int) -> list[Arguments]:
        """Return the keyword arguments of a layer for each batch."""
        return [each[layer] for each in self._arguments]

    def outputs(self, layer: int, module: nn.Module) -> Iterator[Tensor]:
        """Yield the output of a layer for each batch; the hidden states are not replaced."""
        for hidden, arguments in zip(self.hidden, self._arguments, strict=True):
            yield module(self.context.fetch(hidden), **arguments[layer])

    def inputs_within(self, layer: int, module: nn.Module, inner: str) -> Iterator[tuple[Tensor, ...]]:
        """Yield for each batch the positional arguments of a module inside a layer; the layer stops computing there."""
        for (inputs,) in self.inputs_on_the_way(layer, module, [inner]):
            yield inputs

    def inputs_on_the_way(
        self, layer: int, module: nn.Module, reached: Sequence[str]
    ) -> Iterator[Sequence[tuple[Tensor, ...]]]:
        """Yield for each batch the positional arguments of modules inside a layer, in the order that data reaches them.

        The layer stops computing at the last one.
        """
        found: list[tuple[Tensor, ...]] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs)
            if len(found) == len(reached):
                captured = tuple(found)
                found.clear()
                raise _CapturedError(captured)

        with _hooked(module, reached, note):
            yield from self._capture(layer, module)

    def run_noting(
        self, layer: int, module: nn.Module, reached: Sequence[str]
    ) -> Iterator[Sequence[tuple[Tensor, ...]]]:
        """Run every batch through a layer, and replace its hidden states; yield what its modules get on the way.

        See :meth:`inputs_on_the_way`.
        """
        found: list[tuple[Tensor, ...]] = []
        with _hooked(module, reached, lambda _, inputs: found.append(inputs)):
            for hidden, output in zip(self.hidden, self.outputs(layer, module), strict=True):
                yield tuple(found)
                found.clear()
                hidden.copy_(output, non_blocking=True)

    def cache_outputs(self, layer: int, module: nn.Module, last: str, inputs: list[Tensor]) -> None:
        """Replace a child of a layer by its outputs for the batches; its weights are freed.

        Args:
            layer: The layer's number.
            module: The layer.
            last: The child's last linear layer, such as ``self_attn.o_proj``; the child computes nothing after it.
            inputs: The inputs of the last linear layer for each batch; the list is emptied.
        """
        inner, linear, copies = last.partition(".")[0], module.get_submodule(last), len(inputs)
        returned = self._return_value(layer, module, inner, linear)
        outputs = list[Tensor]()
        while inputs:
            output = linear(self.context.fetch(inputs.pop(0)))
            outputs.append(self.context.offload(output, copies=copies))
        setattr(module, inner, _CachedOutputs(outputs, returned, self.context))

    def _return_value(self, layer: int, module: nn.Module, inner: str, linear: nn.Module) -> Any:
        """Return the return value of a child, with an empty tensor for the output of its last linear layer."""
        outputs = list[Tensor]()

        def record(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output)

        def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            raise _CapturedError(output)

        with linear.register_forward_hook(record), module.get_submodule(inner).register_forward_hook(stop):
            returned = next(self._capture(layer, module))

        def emptied(tensor: Tensor) -> Tensor:
            assert tensor is outputs[-1], f"{inner} returns more than the output of {linear}"
            return torch.empty(0)

        return _map_tensors(emptied, returned)

    def _capture(self, layer: int, module: nn.Module) -> Iterator[Any]:
        """Run each batch until a hook raises :class:`_CapturedError`; yield the captured value."""
        for hidden, arguments in zip(self.hidden, self._arguments, strict=True):
            try:
                module(self.context.fetch(hidden), **arguments[layer])
            except _CapturedError as captured:
                yield captured.value

    def pop_head_inputs(self) -> list[Tensor]:
        """Return the input of the output head for each batch, [B, T, H]; the hidden states are removed."""
        inputs: list[Tensor] = []
        for batch in self._batches:
            head_input = self.meta_model.head_inputs(batch, self.context.fetch(self.hidden.pop(0)))
            inputs.append(self.context.offload(head_input, copies=self._copies))
        return inputs


def advance(streams: Sequence[LayerStream], beside: Mapping[LayerStream, LayerStream] = _NONE) -> Iterator[int]:
    """Run models side by side, layer by layer; yield the number of each layer once all models have passed it.

    Args:
        streams: The models.
        beside: Model -> other tokens that pass through its layers too, which are read once for both.

    Raises:
        InputRefused: The models have different numbers of layers.
    """
    depths = {len(stream.parts) for stream in streams}
    if len(depths) != 1:
        raise InputRefused(
            f"The models have {sorted(depths)} layers, expected equal numbers.",
            remedy="Compare models of one family and size.",
        )
    depth = depths.pop()
    modules = iter_modules([(stream, layer) for layer in range(depth) for stream in streams])
    for layer in range(depth):
        for stream in streams:
            module = next(modules)
            stream.run(layer, module)
            if stream in beside:
                beside[stream].run(layer, module)
            del module
        yield layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Logits of several models for the same tokens and the same block of the vocabulary.

    Attributes:
        batch: Number of the batch of tokens.
        first: The first token id of the block.
        values: For each model, float32 [tokens, block]; the last position of each window predicts nothing and is
            absent. Blocks of a smaller vocabulary end sooner, and may be empty.
    """

    batch: int
    first: int
    values: Sequence[Tensor]


@torch.inference_mode()
def logit_blocks(streams: Sequence[LayerStream], context: ComputeContext) -> Iterator[Logits]:
    """Yield the logits of the models for all batches, one block of the vocabulary after another.

    Each output head is read once, in blocks of rows; logits over the whole vocabulary are never in memory.
    """
    heads = [stream.weights.checkpoint.tensors[stream.weights.head] for stream in streams]
    head_inputs = [stream.pop_head_inputs() for stream in streams]
    ranges = list(block_ranges(max((head.spec for head in heads), key=lambda spec: spec.nbytes)))
    rows = context.load_each([head.part(*rows_of) for rows_of in ranges for head in heads])
    for start, _ in ranges:
        blocks = [next(rows) for _ in heads]
        for batch, hidden in enumerate(zip(*head_inputs, strict=True)):
            values = [
                product(context.fetch(states)[:, :-1].flatten(0, 1), block)
                for states, block in zip(hidden, blocks, strict=True)
            ]
            yield Logits(batch=batch, first=start, values=values)
        del blocks


def product(hidden_NH: Tensor, rows_VH: Tensor) -> Tensor:
    """Return float32 logits [N, V] of hidden states and rows of an output head."""
    if hidden_NH.device.type == "cuda" and hidden_NH.dtype != torch.float32:
        return torch.mm(hidden_NH, rows_VH.T, out_dtype=torch.float32)
    return (hidden_NH @ rows_VH.T).float()


@contextmanager
def _hooked(
    module: nn.Module, reached: Sequence[str], note: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Generator[None]:
    """Call ``note`` with the positional arguments of modules inside a layer, before each is called."""
    with ExitStack() as hooks:
        for name in reached:
            hooks.enter_context(module.get_submodule(name).register_forward_pre_hook(note))
        yield


def _deduplicated(arguments: Sequence[Arguments], earlier: Sequence[Arguments]) -> Sequence[Arguments]:
    """Return a batch's arguments; values equal to the first batch's are replaced by these, since most are shared."""
    if not earlier:
        return arguments
    return [
        {name: first.get(name) if _equal(value, first.get(name)) else value for name, value in values.items()}
        for values, first in zip(arguments, earlier, strict=True)
    ]


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors of a return value, a tensor or a tuple."""
    if isinstance(value, tuple):
        return tuple(_map_tensors(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value is other or (value.shape == other.shape and torch.equal(value, other))
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value is other)
