"""Weights of modules in memory, from the tensors of a checkpoint on disk.

The two differ. A language model's names have a prefix that depends on the family; experts that Transformers keeps in
one tensor may be stored one by one, or transposed; a quantized linear layer is stored as codes, and its weight is
computed where it is needed.
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
from qwen_pipeline.qwen.families import stored_head
from qwen_pipeline.qwen.names import decoder_prefix
from qwen_pipeline.transforms.gptq_codes import CODES, PackedLinear, gptq_format

READERS = 4
"""Threads that read one layer's tensors: one alone does not keep a fast disk busy."""

T = TypeVar("T")
U = TypeVar("U")
HostTensors = dict[str, Tensor]
Take = Callable[[str], Tensor]
"""Hands out a stored tensor by name, once, on the device of the parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one parameter comes from stored tensors: ``write`` fills it, in whatever dtype it has."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    write: Callable[[Tensor, Take], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """All parameters of one module, by their names in it; ``integers`` are the dtypes of those that are no floats."""

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    integers: Mapping[str, torch.dtype]

    @property
    def numel(self) -> int:
        return sum(prod(recipe.shape) for recipe in self.recipes.values())

    def read(self, *, room: int | None = None, pinned: bool = False) -> HostTensors:
        """Return stored tensors in host memory, in their order; with a bound, the first ``room`` bytes of them.

        What is left out is read when it is needed. From ``pinned`` memory a GPU copies while it computes.
        """
        names = [name for recipe in self.recipes.values() for name in recipe.stored]
        ends = accumulate(self.checkpoint[name].nbytes for name in names)
        fitting = [name for name, end in zip(names, ends, strict=True) if room is None or end <= room]

        def load(name: str) -> Tensor:
            tensor = self.checkpoint.load(name)
            return tensor.pin_memory() if pinned else tensor

        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(fitting, pool.map(load, fitting), strict=True))

    def assemble(self, stored: HostTensors, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Compute the parameters. ``stored`` is emptied on the way, so that memory is given back."""

        def take(name: str) -> Tensor:
            tensor = stored.pop(name) if name in stored else self.checkpoint.load(name)
            return tensor.to(device, non_blocking=True)

        parameters: dict[str, Tensor] = {}
        for name, recipe in self.recipes.items():
            parameters[name] = torch.empty(recipe.shape, dtype=self.integers.get(name, dtype), device=device)
            recipe.write(parameters[name], take)
        return parameters

    def load(self, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.assemble({}, device=device, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A checkpoint by the names of its language model: ``embed_tokens.weight``, ``layers.0.mlp.up_proj.weight``, ..."""

    checkpoint: Checkpoint
    prefix: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Weights":
        """Find the language model of a checkpoint.

        Raises:
            CheckpointRefused: It has none.
        """
        return cls(checkpoint=checkpoint, prefix=decoder_prefix(checkpoint))

    @property
    def embedding(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def head(self) -> str:
        """The stored tensor that is the output head, or the embedding."""
        return stored_head(self.checkpoint) or self.embedding

    def part(self, path: str, module: nn.Module) -> Part:
        """Return how the parameters of ``module``, which the language model has at ``path``, are stored.

        Raises:
            CheckpointRefused: One of them is not in the checkpoint, or has another shape.
        """
        parameters = module.state_dict()
        return Part(
            checkpoint=self.checkpoint,
            recipes={
                name: self._recipe(f"{self.prefix}{path}.{name}", tuple(tensor.shape))
                for name, tensor in parameters.items()
            },
            integers={name: tensor.dtype for name, tensor in parameters.items() if not tensor.is_floating_point()},
        )

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return these rows of the embedding, which must be ascending; no other row is read.

        Raises:
            InputRefused: It does not have that many.
        """
        if ids[-1] >= (vocabulary := self.checkpoint[self.embedding].rows):
            raise InputRefused(
                f"There is a token {ids[-1]}, but {self.embedding} has {vocabulary} rows.",
                remedy="Use the tokenizer of this model, and text without tokens that another one added.",
            )
        blocks = [self.checkpoint.load(self.embedding, slice(start, stop)) for start, stop in _runs(ids)]
        return torch.cat(blocks)

    def _recipe(self, name: str, shape: tuple[int, ...]) -> Recipe:
        found = self.checkpoint.get(name)
        module, experts = name.removesuffix(".weight"), name.rpartition(".")[0]
        if found and found.shape == shape:
            return Recipe(stored=(name,), shape=shape, write=lambda out, take: out.copy_(take(name)))
        if found and len(shape) == 3 and found.shape == (shape[0], shape[2], shape[1]):
            return Recipe(stored=(name,), shape=shape, write=lambda out, take: out.copy_(take(name).mT))
        if f"{module}.qweight" in self.checkpoint:
            return self._dequantized(module, shape)
        if f"{module}.shard_0.weight" in self.checkpoint:
            return self._from_shards(module, shape)
        if name.endswith("experts.gate_up_proj"):
            half = (shape[1] // 2, shape[2])
            pairs = [[self._recipe(f"{experts}.{e}.{kind}.weight", half) for kind in _HALVES] for e in range(shape[0])]
            return _stacked([_above(pair) for pair in pairs])
        if name.endswith("experts.down_proj"):
            return _stacked([self._recipe(f"{experts}.{e}.down_proj.weight", shape[1:]) for e in range(shape[0])])
        raise CheckpointRefused(
            f"{name} is {f'{list(found.shape)}' if found else 'missing'}, the model needs {list(shape)}.",
            remedy="Config and weights must be of one model, in a layout of a Qwen family.",
        )

    def _from_shards(self, module: str, shape: tuple[int, ...]) -> Recipe:
        """Put a table together whose rows are stored in parts, as an embedding of n-grams is."""
        names = [f"{module}.shard_{n}.weight" for n in range(len(self.checkpoint))]
        names = [name for name in names if name in self.checkpoint]

        def write(out: Tensor, take: Take) -> None:
            for rows, name in zip(out.split([self.checkpoint[n].rows for n in names]), names, strict=True):
                rows.copy_(take(name))

        return Recipe(stored=tuple(names), shape=shape, write=write)

    def _dequantized(self, module: str, shape: tuple[int, ...]) -> Recipe:
        form = gptq_format(self.checkpoint.config)
        names = {code: f"{module}.{code}" for code in CODES}
        for code, spec in form.code_specs(shape[0], shape[1]).items():
            if self.checkpoint.get(names[code]) != spec:
                raise CheckpointRefused(
                    f"{names[code]} is {self.checkpoint.get(names[code])}, expected {spec}.",
                    remedy="Quantize the checkpoint again.",
                )

        def write(out: Tensor, take: Take) -> None:
            packed = PackedLinear(format=form, **{code: take(name) for code, name in names.items()})
            for start, stop in block_ranges(TensorSpec(dtype="F32", shape=shape)):
                out[start:stop] = packed.weight_rows(start, stop)

        return Recipe(stored=tuple(names.values()), shape=shape, write=write)


_HALVES = ("gate_proj", "up_proj")


def fill(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module of the meta device with real weights."""
    real = copy.deepcopy(module)
    real.load_state_dict(parameters, assign=True)
    return real.eval().requires_grad_(requires_grad=False)


def ahead(steps: Sequence[tuple[Callable[[], T], Callable[[T], U]]]) -> Iterator[U]:
    """Yield ``use(read())`` for each ``(read, use)``; the next one reads in a thread once this one was used.

    Nothing that was yielded is kept here, so that it is gone when the receiver drops it.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read) for read, _ in steps[:1]]
        for (_, use), following in zip(steps, [*steps[1:], None], strict=True):
            used = [use(coming.pop().result())]
            coming += [pool.submit(following[0])] if following else []
            yield used.pop()


def _stacked(recipes: Sequence[Recipe]) -> Recipe:
    """Put parameters into one, along a new first axis."""

    def write(out: Tensor, take: Take) -> None:
        for slot, recipe in zip(out, recipes, strict=True):
            recipe.write(slot, take)

    return Recipe(stored=_stored(recipes), shape=(len(recipes), *recipes[0].shape), write=write)


def _above(recipes: Sequence[Recipe]) -> Recipe:
    """Put parameters of one shape into one, along its first axis."""
    stacked, (rows, *rest) = _stacked(recipes), recipes[0].shape

    def write(out: Tensor, take: Take) -> None:
        stacked.write(out.view(len(recipes), rows, *rest), take)

    return Recipe(stored=stacked.stored, shape=(len(recipes) * rows, *rest), write=write)


def _stored(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    return tuple(name for recipe in recipes for name in recipe.stored)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ``start, stop`` of each run of consecutive numbers."""
    start = previous = ids[0]
    for number in ids[1:]:
        if number != previous + 1:
            yield start, previous + 1
            start = number
        previous = number
    yield start, previous + 1
