"""Tensors of a model in the layout of another: transposed, stacked, or taken out of a stack."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, concatenated
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.channels import channels_of
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.names import DOWN, FUSED, GATE_UP, ParsedName, stack_of
from qwen_pipeline.transforms.lora.low_rank import transposed

if TYPE_CHECKING:
    import torch

_NGRAMS = "ple.ple_embedding.ngram_embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and the names of its tensors by meaning."""

    checkpoint: Checkpoint
    names: Mapping[ParsedName, str]

    def tensor(self, place: ParsedName) -> LazyTensor:
        return self.checkpoint.tensors[self.names[place]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor in another layout, and the names of the stored tensors that it is made of."""

    tensor: LazyTensor
    sources: Sequence[str]


def require_stacks(source: Source) -> None:
    """Require that each stack of experts has three axes.

    Raises:
        CheckpointRefused: One of them has not; the message names it.
    """
    for place, name in source.names.items():
        if place.module.endswith(FUSED) and len(shape := source.checkpoint[name].shape) != 3:
            raise CheckpointRefused(
                f"{name} is {list(shape)}, but a stack of experts has three axes.", remedy="Save the model again."
            )


def placed(parsed: ParsedName, spec: TensorSpec, source: Source) -> Placed | None:
    """Return the tensor of ``source`` that has the meaning ``parsed``, in the layout of ``spec``; None if it has none.

    The result has the shape of ``spec`` unless the models have different sizes; its dtype is that of the source.

    Args:
        parsed: The meaning.
        spec: The tensor with this meaning in the other model.
        source: The model.

    Raises:
        CheckpointRefused: Some of the experts of a stack are missing, or they differ in dtype or shape.
    """
    if parsed in source.names:
        return _same(parsed, spec, source)
    if parsed.module.endswith(FUSED):
        return _stacked(parsed, spec, source)
    stack = replace(parsed, module=stack_of(parsed.module) or "")
    if stack in source.names:
        return _unstacked(parsed, stack, source)
    return _joined_rows(parsed, spec, source)


def _same(parsed: ParsedName, spec: TensorSpec, source: Source) -> Placed:
    tensor = source.tensor(parsed)
    is_turned = parsed.module.endswith(FUSED) and tensor.spec.shape == _turned(spec.shape) != spec.shape
    return Placed(tensor=transposed(tensor) if is_turned else tensor, sources=[source.names[parsed]])


def _stacked(parsed: ParsedName, spec: TensorSpec, source: Source) -> Placed | None:
    """Stack single experts: [E, 2I, H] and [E, H, I], or transposed."""
    owner, _, kind = parsed.module.rpartition(".")
    projections = ("down",) if kind == "down_proj" else ("gate", "up")
    experts = [
        [replace(parsed, module=f"{owner}.{expert}.{projection}_proj") for projection in projections]
        for expert in range(spec.shape[0])
    ]
    places = [place for expert in experts for place in expert]
    if not any(place in source.names for place in places):
        return None
    _require_alike(places, source)
    first = source.tensor(places[0]).spec
    shape = (len(experts), first.rows * len(projections), *first.shape[1:])
    is_turned = _is_transposed(parsed, spec.shape, source.checkpoint.config)

    def read(start: int, stop: int) -> "torch.Tensor":
        import torch

        stack = torch.empty((stop - start, *shape[1:]), dtype=first.torch_dtype)
        for matrix, expert in zip(stack, experts[start:stop], strict=True):
            for rows, place in zip(matrix.split(first.rows), expert, strict=True):
                rows.copy_(source.checkpoint.load(source.names[place]))
        return stack.transpose(1, 2) if is_turned else stack

    return Placed(
        tensor=LazyTensor(spec=replace(first, shape=_turned(shape) if is_turned else shape), read=read),
        sources=[source.names[place] for place in places],
    )


def _unstacked(parsed: ParsedName, stack: ParsedName, source: Source) -> Placed | None:
    """Take the matrix of one expert's projection out of a stack; a block of rows costs one read of the expert."""
    expert, projection = parsed.module.split(".")[-2:]
    tensor, number = source.tensor(stack), int(expert)
    is_turned = _is_transposed(stack, tensor.spec.shape, source.checkpoint.config)
    experts, outputs, inputs = _turned(tensor.spec.shape) if is_turned else tensor.spec.shape
    if number >= experts:
        return None
    rows = outputs // 2 if stack.module.endswith(GATE_UP) else outputs
    first = rows if projection == "up_proj" else 0

    def read(start: int, stop: int) -> "torch.Tensor":
        matrix = tensor.read(number, number + 1)[0]
        return (matrix.T if is_turned else matrix)[first + start : first + stop]

    spec = replace(tensor.spec, shape=(rows, inputs))
    return Placed(tensor=LazyTensor(spec=spec, read=read), sources=[source.names[stack]])


def _joined_rows(parsed: ParsedName, spec: TensorSpec, source: Source) -> Placed | None:
    """Join the shards of an n-gram table, or take one of them out of the whole."""
    owner, _, number = parsed.module.partition(f"{_NGRAMS}.shard_")
    if number and (name := source.names.get(replace(parsed, module=f"{owner}{_NGRAMS}"))):
        table = source.checkpoint.tensors[name]
        first = min(int(number) * spec.rows, max(0, table.spec.rows - spec.rows))
        return Placed(tensor=table.part(first, first + spec.rows), sources=[name])
    shards = list(_shards(parsed, source.names)) if parsed.module == _NGRAMS else []
    tensors = [source.checkpoint.tensors[name] for name in shards]
    return Placed(tensor=concatenated(tensors), sources=shards) if shards else None


def _shards(parsed: ParsedName, names: Mapping[ParsedName, str]) -> Iterator[str]:
    for number in range(len(names)):
        if (name := names.get(replace(parsed, module=f"{parsed.module}.shard_{number}"))) is None:
            return
        yield name


def _require_alike(places: Sequence[ParsedName], source: Source) -> None:
    """Require that all matrices that become one stack are stored, in one dtype and with one shape."""
    if missing := [place.module for place in places if place not in source.names]:
        raise CheckpointRefused(
            f"Experts of layer {places[0].layer} are missing: {listed(missing)}.",
            remedy="Provide all shards of the fine-tune.",
        )
    names = [source.names[place] for place in places]
    specs = {name: source.checkpoint[name] for name in names}
    if len(set(specs.values())) > 1:
        shown = [f"{name} is {spec.dtype} {list(spec.shape)}" for name, spec in specs.items()]
        raise CheckpointRefused(
            f"The base stores these tensors in one stack, but they differ: {listed(shown)}.",
            remedy="Save the fine-tune again with all experts of a layer in one dtype.",
        )


def _is_transposed(parsed: ParsedName, shape: tuple[int, ...], config: Config) -> bool:
    channels = channels_of(parsed, shape, config)
    return channels is not None and channels.axis == (1 if parsed.module == DOWN else 2)


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])
