"""The tensors of a packed layer, and how channels are added to them: the unit of each axis, and the codes of zero.

Channels are added in whole quantization groups, which are also whole words: no live word is unpacked or rewritten,
regardless of the layout of its bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.transforms.padding.strided import copy_channels

if TYPE_CHECKING:
    import torch

    from qwen_pipeline.qwen.geometry import PaddedSize

Dimension = Literal["in", "out"]
WORD_BITS = 32
ADDED_SCALE = 2.0**-14
"""The scale of added channels, all of whose weights are zero: the smallest normal float16, so that it is never the
largest scale of a layer, by which some engines normalize, and a power of two, so that products with it are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """The addition of channels along one dimension of a layer; ``size.positions()`` are those of the live channels.

    Attributes:
        group_size: Inputs of a group of the layer's codes; those of the size's, which it divides, if None.
    """

    dimension: Dimension
    size: "PaddedSize"
    group_size: int | None = None

    @property
    def inputs_per_group(self) -> int:
        return self.group_size or self.size.group_size


class CodeTensor(Protocol):
    """One tensor of a packed layer."""

    def fits(self, spec: TensorSpec, widening: Widening) -> bool:
        """Return whether a tensor's shape agrees with the live width."""
        ...

    def widened(self, tensor: LazyTensor, widening: Widening) -> LazyTensor:
        """Return the tensor with the channels added, or unchanged if none of its axes has them."""
        ...


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a tensor, each of whose elements is ``per`` inputs or outputs, or one group of inputs."""

    counts: Literal["in", "out", "groups"]
    per: int = 1

    def channels(self, widening: Widening) -> int:
        """Return the number of channels of the widened dimension in one element; 0 if the axis does not count it."""
        if self.counts == "groups":
            return widening.inputs_per_group if widening.dimension == "in" else 0
        return self.per if self.counts == widening.dimension else 0


@dataclass(frozen=True, slots=True)
class Elements(CodeTensor):
    """A tensor of codes, scales or weights; new elements are ``fill``."""

    axes: tuple[Axis, ...]
    fill: float = 0

    def fits(self, spec: TensorSpec, widening: Widening) -> bool:
        per_element = [axis.channels(widening) for axis in self.axes]
        return len(spec.shape) == len(self.axes) and all(
            length * per == widening.size.live for length, per in zip(spec.shape, per_element, strict=True) if per
        )

    def widened(self, tensor: LazyTensor, widening: Widening) -> LazyTensor:
        for index, axis in enumerate(self.axes):
            if per := axis.channels(widening):
                positions = widening.size.positions()[::per] // per
                return widened(tensor, index, widening.size.padded // per, positions, fill=self.fill)
        return tensor


class GroupNumbers(CodeTensor):
    """The group of each input, ``g_idx``: live inputs keep theirs, renumbered; added inputs get added groups."""

    def fits(self, spec: TensorSpec, widening: Widening) -> bool:
        return len(spec.shape) == 1 and (widening.dimension == "out" or spec.rows == widening.size.live)

    def widened(self, tensor: LazyTensor, widening: Widening) -> LazyTensor:
        import torch

        if widening.dimension == "out":
            return tensor
        spec = replace(tensor.spec, shape=(widening.size.padded,))

        def read(start: int, stop: int) -> "torch.Tensor":
            positions = widening.size.positions()
            groups = torch.arange(widening.size.padded) // widening.inputs_per_group
            new_number = groups[positions[:: widening.inputs_per_group]]
            groups[positions] = new_number[tensor.read(0, widening.size.live).long()]
            return groups[start:stop].to(spec.torch_dtype)

        return LazyTensor(spec=spec, read=read)


class StatedShape(CodeTensor):
    """The shape [out, in] of the weight, stored as a tensor."""

    def fits(self, spec: TensorSpec, widening: Widening) -> bool:  # noqa: ARG002
        return spec.shape == (2,)

    def widened(self, tensor: LazyTensor, widening: Widening) -> LazyTensor:
        def read(start: int, stop: int) -> "torch.Tensor":
            shape = tensor.read(0, 2).clone()
            shape[("out", "in").index(widening.dimension)] = widening.size.padded
            return shape[start:stop]

        return LazyTensor(spec=tensor.spec, read=read)


UNPACKED: Mapping[str, CodeTensor] = MappingProxyType(
    {"weight": Elements((Axis("out"), Axis("in"))), "bias": Elements((Axis("out"),))}
)
"""The weight of a layer that was not quantized, and the bias of any layer."""


def widened(tensor: LazyTensor, axis: int, width: int, positions: "torch.Tensor", *, fill: float = 0) -> LazyTensor:
    """Return the tensor with ``width`` elements along ``axis`` (0, 1): its own at ``positions``, ``fill`` elsewhere."""
    import torch

    shape = list(tensor.spec.shape)
    shape[axis] = width
    spec = replace(tensor.spec, shape=tuple(shape))

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        first, last = (int(n) for n in torch.searchsorted(positions, torch.tensor([start, stop])))
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).fill_(fill)
        live = torch.arange(last - first)
        return copy_channels(tensor.read(first, last), live, block, positions[first:last] - start, axis=0)

    def read_columns(start: int, stop: int) -> "torch.Tensor":
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).fill_(fill)
        return copy_channels(tensor.read(start, stop), torch.arange(len(positions)), block, positions, axis=1)

    return LazyTensor(spec=spec, read=read_rows if axis == 0 else read_columns)


def word_of(code: int, bits: int) -> int:
    """Return the int32 word that holds the same code at each position."""
    word = sum(code << shift for shift in range(0, WORD_BITS, bits))
    return word - (word >> (WORD_BITS - 1) << WORD_BITS)
