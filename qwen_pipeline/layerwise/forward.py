"""Many batches through one or several models, one decoder layer in memory at a time.

Layer by layer: read the layer (what follows is read meanwhile), take every batch through it, let it go. Hidden states
of all batches stay; weights do not. So a model is read once, and memory does not depend on how many layers it has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.layerwise.meta_model import Arguments
from qwen_pipeline.layerwise.model import ComputeContext, LayeredModel, modules


class _ArrivedError(Exception):
    """Ends a layer's forward pass where it has got to what is wanted: arguments of a module, or what it returns."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


class _Kept(nn.Module):
    """Stands where a module was that need not compute again: returns what it made of each batch, in their order.

    Args:
        outputs: Of each batch, the one tensor that the module returned.
        returned: What it returns, a tensor or a tuple with it; which tensor is in there does not matter.
        context: Where to compute.
    """

    def __init__(self, outputs: Sequence[Tensor], returned: Any, context: ComputeContext) -> None:
        super().__init__()
        self._outputs, self._returned, self._context, self._turn = outputs, returned, context, 0

    def forward(self, *_: Any, **__: Any) -> Any:
        output = self._outputs[self._turn % len(self._outputs)]
        self._turn += 1
        return _each(lambda _: self._context.fetch(output), self._returned)


class LayerStream(LayeredModel):
    """Batches on their way through one model.

    Args:
        checkpoint: Full precision or GPTQ codes, of any Qwen family.
        batches: Token ids [B, T].
        context: Where to compute.
        beside: How many other models will be on their way at the same time.

    Attributes:
        context: Where it computes.
        hidden: Of each batch, [B, T, H]: what entered the first layer, then what left the last layer that was run.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Tensor], context: ComputeContext, *, beside: int = 0
    ) -> None:
        super().__init__(checkpoint, context)
        self._batches, self._copies = batches, len(batches) * (1 + beside)
        self.hidden: list[Tensor] = []
        self._arguments: list[Sequence[Arguments]] = []
        for batch in batches:
            entry = self.meta_model.enter(batch)
            self.hidden.append(context.shelve(entry.hidden, copies=self._copies))
            self._arguments.append(_sharing(entry.arguments, self._arguments[0] if self._arguments else ()))

    @torch.inference_mode()
    def run(self, layer: int, module: nn.Module) -> None:
        """Take every batch through a layer."""
        for hidden, output in zip(self.hidden, self.outputs(layer, module), strict=True):
            hidden.copy_(output, non_blocking=True)

    def outputs(self, layer: int, module: nn.Module) -> Iterator[Tensor]:
        """Yield what a layer makes of each batch; the batches stay where they are."""
        for hidden, arguments in zip(self.hidden, self._arguments, strict=True):
            yield module(self.context.fetch(hidden), **arguments[layer])

    def inputs_within(self, layer: int, module: nn.Module, inner: str) -> Iterator[tuple[Tensor, ...]]:
        """Yield what each batch enters a module inside a layer with, all positional arguments of its call.

        The layer computes no further than that.
        """

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ArrivedError(inputs)

        with module.get_submodule(inner).register_forward_pre_hook(stop):
            yield from self._up_to_there(layer, module)

    def keep(self, layer: int, module: nn.Module, last: str, entering: list[Tensor]) -> None:
        """Put what a child of a layer returns for each batch in its place; its weights go.

        Args:
            layer: The layer's number.
            module: The layer.
            last: The child's last linear layer, such as ``self_attn.o_proj``; after it the child computes nothing.
            entering: What enters that for each batch; it is used up.
        """
        inner, linear, copies = last.partition(".")[0], module.get_submodule(last), len(entering)
        returned = self._returned(layer, module, inner, linear)
        outputs = list[Tensor]()
        while entering:
            output = linear(self.context.fetch(entering.pop(0)))
            outputs.append(self.context.shelve(output, copies=copies))
        setattr(module, inner, _Kept(outputs, returned, self.context))

    def _returned(self, layer: int, module: nn.Module, inner: str, linear: nn.Module) -> Any:
        """Return what a child returns, an empty tensor for what its last linear layer did."""
        made = list[Tensor]()

        def note(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            made.append(output)

        def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            raise _ArrivedError(output)

        with linear.register_forward_hook(note), module.get_submodule(inner).register_forward_hook(stop):
            returned = next(self._up_to_there(layer, module))

        def leave_out(tensor: Tensor) -> Tensor:
            assert tensor is made[-1], f"{inner} returns more than what {linear} does"
            return torch.empty(0)

        return _each(leave_out, returned)

    def _up_to_there(self, layer: int, module: nn.Module) -> Iterator[Any]:
        """Run each batch until a hook says that it has arrived; yield what was found there."""
        for hidden, arguments in zip(self.hidden, self._arguments, strict=True):
            try:
                module(self.context.fetch(hidden), **arguments[layer])
            except _ArrivedError as arrived:
                yield arrived.found

    def leave(self) -> list[Tensor]:
        """Return what enters the output head for each batch, [B, T, H]; no hidden state is kept."""
        leaving: list[Tensor] = []
        for batch in self._batches:
            left = self.meta_model.leave(batch, self.context.fetch(self.hidden.pop(0)))
            leaving.append(self.context.shelve(left, copies=self._copies))
        return leaving


def advance(streams: Sequence[LayerStream]) -> Iterator[int]:
    """Take models through their layers side by side; yield each layer's number once all have passed it.

    Raises:
        InputRefused: The models have different numbers of layers.
    """
    depths = {len(stream.parts) for stream in streams}
    if len(depths) != 1:
        raise InputRefused(f"The models have {sorted(depths)} layers.", remedy="Compare models of one family and size.")
    steps = [(stream, layer) for layer in range(depths.pop()) for stream in streams]
    coming = modules(steps)
    for stream, layer in steps:
        stream.run(layer, next(coming))
        if stream is streams[-1]:
            yield layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Several models' logits for the same tokens and the same part of the vocabulary.

    Attributes:
        batch: Which batch the tokens are.
        first: The first token id of the part.
        values: Of each model, float32 [tokens, part]; the last position of each window predicts nothing and is absent.
            A smaller vocabulary's parts end sooner and are empty at last.
    """

    batch: int
    first: int
    values: Sequence[Tensor]


@torch.inference_mode()
def logit_blocks(streams: Sequence[LayerStream], context: ComputeContext) -> Iterator[Logits]:
    """Yield the models' logits for all batches, a part of the vocabulary after the other.

    Each output head is read once, in blocks of rows; logits over the whole vocabulary are never in memory.
    """
    heads = [stream.weights.checkpoint.tensors[stream.weights.head] for stream in streams]
    leaving = [stream.leave() for stream in streams]
    ranges = list(block_ranges(max((head.spec for head in heads), key=lambda spec: spec.nbytes)))
    rows = context.bring([head.part(*ends) for ends in ranges for head in heads])
    for start, _ in ranges:
        near = [next(rows) for _ in heads]
        for batch, hidden in enumerate(zip(*leaving, strict=True)):
            values = [
                product(context.fetch(states)[:, :-1].flatten(0, 1), block)
                for states, block in zip(hidden, near, strict=True)
            ]
            yield Logits(batch=batch, first=start, values=values)
        del near


def product(hidden_NH: Tensor, rows_VH: Tensor) -> Tensor:
    """Return logits, float32 [N, V], of hidden states and some rows of an output head."""
    if hidden_NH.device.type == "cuda" and hidden_NH.dtype != torch.float32:
        return torch.mm(hidden_NH, rows_VH.T, out_dtype=torch.float32)
    return (hidden_NH @ rows_VH.T).float()


def _sharing(arguments: Sequence[Arguments], earlier: Sequence[Arguments]) -> Sequence[Arguments]:
    """Return a batch's arguments, with the first batch's in the place of equal ones: most are the same for all."""
    if not earlier:
        return arguments
    return [
        {name: first.get(name) if _equal(value, first.get(name)) else value for name, value in own.items()}
        for own, first in zip(arguments, earlier, strict=True)
    ]


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return what a module returns, a tensor or a tuple with some, its tensors changed."""
    if isinstance(value, tuple):
        return tuple(_each(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value is other or (value.shape == other.shape and torch.equal(value, other))
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value is other)
