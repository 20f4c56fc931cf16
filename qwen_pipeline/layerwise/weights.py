"""Parameters of modules, computed from the stored tensors of a checkpoint.

Parameters and stored tensors differ. The names of a language model have a prefix that depends on the family; experts
that Transformers keeps in one tensor may be stored one by one, or transposed; a quantized linear layer is stored as
codes, and its weight is dequantized on the device.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.layerwise.input_rounding import InputRounding
from qwen_pipeline.qwen.families import stored_head
from qwen_pipeline.qwen.names import decoder_prefix
from qwen_pipeline.transforms.codes.fp8 import SCALE_DTYPES, fp8_format
from qwen_pipeline.transforms.codes.gptq import CODES, PackedLinear, gptq_format
from qwen_pipeline.transforms.codes.scaled_floats import FLOATS

READERS = 8
"""Reading threads; a single thread does not keep a fast disk busy."""
GAP_BYTES, RUN_BYTES = 128 * 2**10, 2**20
"""Largest gap between two requested rows of an embedding that is read along with them, and largest size of one read."""

T = TypeVar("T")
U = TypeVar("U")
HostTensors = dict[str, Tensor]
Take = Callable[[str], Tensor]
"""Returns a stored tensor by name; each can be taken once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightConverter:
    """Computes one parameter from stored tensors.

    Attributes:
        stored: Names of the stored tensors, in the order in which ``write`` takes them.
        write: Fills the parameter, converting to its dtype.
        is_stored: Whether the parameter equals a stored tensor, except for its dtype.
        inputs: How engines round the inputs of the layer; None if they do not.
    """

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    write: Callable[[Tensor, Take], object]
    is_stored: bool = False
    inputs: InputRounding | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """Converters of all parameters of one module, by name.

    Attributes:
        integers: Parameter -> dtype, for those that are not floating point.
    """

    checkpoint: Checkpoint
    converters: Mapping[str, WeightConverter]
    integers: Mapping[str, torch.dtype]

    @property
    def numel(self) -> int:
        return sum(prod(converter.shape) for converter in self.converters.values())

    @property
    def rounded_inputs(self) -> dict[str, InputRounding]:
        """Parameter -> the rounding of its layer's inputs, for weights of 8-bit floats."""
        return {name: converter.inputs for name, converter in self.converters.items() if converter.inputs}

    @property
    def stored(self) -> list[str]:
        """Names of the stored tensors, in the order in which they are taken."""
        return [name for converter in self.converters.values() for name in converter.stored]

    def read(self, *, budget: int) -> HostTensors:
        """Read the first stored tensors, as many as fit into ``budget`` bytes; the others are read when needed."""
        ends = accumulate(self.checkpoint[name].nbytes for name in self.stored)
        fitting = [name for name, end in zip(self.stored, ends, strict=True) if end <= budget]
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(fitting, pool.map(self.checkpoint.load, fitting), strict=True))

    def taking(self, stored: HostTensors) -> Take:
        """Return a function that takes tensors out of ``stored``, so that their memory is freed, or reads them."""
        return lambda name: stored.pop(name) if name in stored else self.checkpoint.load(name)

    def assemble(self, take: Take, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parameters.

        A tensor taken on a GPU is a copy, so it may become the parameter itself; on the CPU it may be shared with
        other users, so it is copied.
        """
        parameters: dict[str, Tensor] = {}
        for name, converter in self.converters.items():
            target_dtype = self.integers.get(name, dtype)
            if converter.is_stored:
                parameters[name] = take(*converter.stored).to(device, target_dtype, copy=device.type == "cpu")
            else:
                parameters[name] = torch.empty(converter.shape, dtype=target_dtype, device=device)
                converter.write(parameters[name], lambda each: take(each).to(device))
        return parameters

    def load(self, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.assemble(self.taking({}), device=device, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """Weights of a checkpoint's language model, by names without prefix: ``layers.0.mlp.up_proj.weight``, ..."""

    checkpoint: Checkpoint
    prefix: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelWeights":
        """Find the language model of a checkpoint.

        Raises:
            CheckpointRefused: The checkpoint has no language model.
        """
        return cls(checkpoint=checkpoint, prefix=decoder_prefix(checkpoint))

    @property
    def embedding(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def head(self) -> str:
        """Name of the stored output head, or of the embedding if the two are tied."""
        return stored_head(self.checkpoint) or self.embedding

    def part(self, path: str, module: nn.Module) -> ModuleWeights:
        """Return the converters for the parameters of ``module``, found at ``path`` in the language model.

        Raises:
            CheckpointRefused: A parameter is missing from the checkpoint, or has another shape.
        """
        parameters = module.state_dict()
        return ModuleWeights(
            checkpoint=self.checkpoint,
            converters={
                name: self._converter(f"{self.prefix}{path}.{name}", tuple(tensor.shape))
                for name, tensor in parameters.items()
            },
            integers={name: tensor.dtype for name, tensor in parameters.items() if not tensor.is_floating_point()},
        )

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return rows of the embedding; ``ids`` must be ascending and not empty.

        Rows between close ids are read along with them: a disk reads them in less time than it needs for another seek.

        Raises:
            InputRefused: An id is outside the embedding.
        """
        if ids[-1] >= (vocabulary := self.checkpoint[self.embedding].rows):
            raise InputRefused(
                f"The text has a token {ids[-1]}, but {self.embedding} has {vocabulary} rows.",
                remedy="Use the tokenizer of this model, and text without tokens that another tokenizer added.",
            )

        def read(first: int, last: int) -> Tensor:
            block = self.checkpoint.load(self.embedding, slice(ids[first], ids[last - 1] + 1))
            return block[torch.tensor(ids[first:last]) - ids[first]]

        runs = _runs(ids, self.checkpoint[self.embedding].row_bytes)
        with ThreadPoolExecutor(READERS) as pool:
            return torch.cat(list(pool.map(read, *zip(*runs, strict=True))))

    def _converter(self, name: str, shape: tuple[int, ...]) -> WeightConverter:
        found = self.checkpoint.get(name)
        module, experts = name.removesuffix(".weight"), name.rpartition(".")[0]
        if found and found.dtype in FLOATS:
            return self._scaled(name, shape)
        if found and found.shape == shape:
            return WeightConverter(
                stored=(name,), shape=shape, write=lambda out, take: out.copy_(take(name)), is_stored=True
            )
        if found and len(shape) == 3 and found.shape == (shape[0], shape[2], shape[1]):
            return WeightConverter(stored=(name,), shape=shape, write=lambda out, take: out.copy_(take(name).mT))
        if f"{module}.qweight" in self.checkpoint:
            return self._dequantized(module, shape)
        if f"{module}.shard_0.weight" in self.checkpoint:
            return self._from_shards(module, shape)
        if name.endswith("experts.gate_up_proj"):
            half = (shape[1] // 2, shape[2])
            pairs = [
                [self._converter(f"{experts}.{e}.{kind}.weight", half) for kind in _HALVES] for e in range(shape[0])
            ]
            return _stacked([_concatenated(pair) for pair in pairs])
        if name.endswith("experts.down_proj"):
            return _stacked([self._converter(f"{experts}.{e}.down_proj.weight", shape[1:]) for e in range(shape[0])])
        raise CheckpointRefused(
            f"{name} {f'has shape {list(found.shape)}' if found else 'is missing'}, expected shape {list(shape)}.",
            remedy="Use config and weights of the same model, in a layout of a Qwen family.",
        )

    def _from_shards(self, module: str, shape: tuple[int, ...]) -> WeightConverter:
        """Concatenate a table whose rows are stored in several tensors, as an n-gram embedding is."""
        names = [f"{module}.shard_{n}.weight" for n in range(len(self.checkpoint))]
        names = [name for name in names if name in self.checkpoint]

        def write(out: Tensor, take: Take) -> None:
            for rows, name in zip(out.split([self.checkpoint[n].rows for n in names]), names, strict=True):
                rows.copy_(take(name))

        return WeightConverter(stored=tuple(names), shape=shape, write=write)

    def _scaled(self, name: str, shape: tuple[int, ...]) -> WeightConverter:
        """Multiply 8-bit floats by their scales."""
        form = fp8_format(self.checkpoint.config.get("quantization_config") or {})
        names = dict(zip(form.suffixes, (name, f"{name.removesuffix('.weight')}.{form.layout.scale}"), strict=True))
        stored = self.checkpoint.get(names[form.layout.scale])
        scale_dtype = stored.dtype if stored and stored.dtype in SCALE_DTYPES else SCALE_DTYPES[0]
        require_specs(self.checkpoint, names, form.code_specs(shape[0], shape[1], scales=scale_dtype))

        def write(out: Tensor, take: Take) -> None:
            codes, scales = (take(each) for each in names.values())
            for start, stop in block_ranges(TensorSpec(dtype="F32", shape=shape)):
                out[start:stop] = form.weight_rows(codes[start:stop], scales, start)

        inputs = InputRounding(per_scale=form.layout.block)
        return WeightConverter(stored=tuple(names.values()), shape=shape, write=write, inputs=inputs)

    def _dequantized(self, module: str, shape: tuple[int, ...]) -> WeightConverter:
        form = gptq_format(self.checkpoint.config).of(self.checkpoint, module)
        names = {code: f"{module}.{code}" for code in CODES}
        require_specs(self.checkpoint, names, form.code_specs(shape[0], shape[1]))

        def write(out: Tensor, take: Take) -> None:
            packed = PackedLinear(format=form, **{code: take(name) for code, name in names.items()})
            packed.write_weight(out)

        return WeightConverter(stored=tuple(names.values()), shape=shape, write=write)


_HALVES = ("gate_proj", "up_proj")


def require_specs(checkpoint: Checkpoint, names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
    """Require that the codes of a layer have the dtypes and shapes that follow from its weight.

    Args:
        checkpoint: The checkpoint.
        names: Suffix of a code -> name of its tensor.
        specs: Suffix of a code -> expected dtype and shape.

    Raises:
        CheckpointRefused: A code is missing or has another dtype or shape.
    """
    for code, spec in specs.items():
        if checkpoint.get(names[code]) != spec:
            raise CheckpointRefused(
                f"{names[code]} is {checkpoint.get(names[code])}, expected {spec}.",
                remedy="Quantize the checkpoint again.",
            )


def fill(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module on the meta device, with these parameters."""
    filled = copy.deepcopy(module)
    filled.load_state_dict(parameters, assign=True)
    return filled.eval().requires_grad_(requires_grad=False)


def pipelined(steps: Sequence[tuple[Callable[[], T], Callable[[T], U]]]) -> Iterator[U]:
    """Yield ``use(read())`` for each ``(read, use)``.

    The next ``read`` starts in a thread once the ``use`` before it has returned.
    No reference to a yielded value is kept here, so its memory is freed when the caller drops it.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(read) for read, _ in steps[:1]]
        for (_, use), following in zip(steps, [*steps[1:], None], strict=True):
            used = [use(pending.pop().result())]
            pending += [pool.submit(following[0])] if following else []
            yield used.pop()


def _stacked(converters: Sequence[WeightConverter]) -> WeightConverter:
    """Combine parameters of one shape into one, along a new first axis."""

    def write(out: Tensor, take: Take) -> None:
        for part, converter in zip(out, converters, strict=True):
            converter.write(part, take)

    return WeightConverter(
        stored=_stored(converters),
        shape=(len(converters), *converters[0].shape),
        write=write,
        inputs=converters[0].inputs,
    )


def _concatenated(converters: Sequence[WeightConverter]) -> WeightConverter:
    """Combine parameters of one shape into one, along their first axis."""
    stacked, (rows, *rest) = _stacked(converters), converters[0].shape

    def write(out: Tensor, take: Take) -> None:
        stacked.write(out.view(len(converters), rows, *rest), take)

    shape = (len(converters) * rows, *rest)
    return WeightConverter(stored=stacked.stored, shape=shape, write=write, inputs=stacked.inputs)


def _stored(converters: Sequence[WeightConverter]) -> tuple[str, ...]:
    return tuple(name for converter in converters for name in converter.stored)


def _runs(ids: Sequence[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Split ascending row numbers into runs that are read at once; yield the first and last index of each, [a, b)."""
    first = 0
    for index in range(1, len(ids)):
        gap, length = ids[index] - ids[index - 1] - 1, ids[index] - ids[first] + 1
        if gap * row_bytes > GAP_BYTES or length * row_bytes > RUN_BYTES:
            yield first, index
            first = index
    yield first, len(ids)
