"""Where a parameter of a model in memory lies in a checkpoint: in one tensor, in a part of one, or cut into several.

Experts are where the two differ: a stack in memory may be stored as one matrix per expert and projection, a single
expert's matrix may be rows of a stack, and a stack may be stored with its matrices transposed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.channels import channels_of
from qwen_pipeline.qwen.families import number_of_experts, require_family
from qwen_pipeline.qwen.names import DOWN, FUSED, GATE_UP, ParsedName, parse_name, spellings, stack_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """Rows of one matrix in memory, and where they are stored.

    Attributes:
        name: The stored tensor.
        expert: Which matrix of the parameter in memory.
        first: Its first row that lies here.
        slab: Which matrix of the stored tensor, if that is a stack; None if it is no stack.
        onto: The stored matrix's row that ``first`` lies on.
        rows: How many rows lie here; None if it is all of them.
        transposed: Whether the stored matrices are transposed.
    """

    name: str
    expert: int = 0
    first: int = 0
    slab: int | None = None
    onto: int = 0
    rows: int | None = None
    transposed: bool = False


def slices_of(parameter: str, checkpoint: Checkpoint) -> list[TensorSlice]:
    """Return where the parameter at this path in memory is stored; nothing if it is not, more than its parts if twice.

    Args:
        parameter: Such as ``model.layers.0.self_attn.q_proj.weight`` or ``model.layers.0.mlp.experts.gate_up_proj``.
        checkpoint: With its tensors under any of the family's spellings.
    """
    try:
        place = parse_name(parameter, checkpoint.config)
    except CheckpointRefused:
        return []
    if stored := _stored(place, checkpoint):
        return [slot for name in stored for slot in _whole(place, name, checkpoint)]
    if place.module in FUSED:
        return list(_cut(place, checkpoint))
    return list(_inside(place, checkpoint))


def _stored(place: ParsedName, checkpoint: Checkpoint) -> list[str]:
    return [name for name in spellings(place, require_family(checkpoint.config)) if name in checkpoint]


def _whole(place: ParsedName, name: str, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    if place.module not in FUSED:
        yield TensorSlice(name=name)
        return
    transposed = _is_transposed(place, name, checkpoint)
    for expert in range(checkpoint[name].shape[0]):
        yield TensorSlice(name=name, expert=expert, slab=expert, transposed=transposed)


def _cut(place: ParsedName, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    """Yield the experts that a stack in memory is stored as."""
    projections = ("down_proj",) if place.module == DOWN else ("gate_proj", "up_proj")
    for expert in range(number_of_experts(checkpoint.config)):
        first = 0
        for projection in projections:
            part = replace(place, module=f"mlp.experts.{expert}.{projection}")
            for name in _stored(part, checkpoint):
                rows = checkpoint[name].shape[0]
                yield TensorSlice(name=name, expert=expert, first=first, rows=rows)
                first += rows


def _inside(place: ParsedName, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    """Yield the rows of a stack that one expert in memory is stored as."""
    stack = stack_of(place.module)
    if stack is None or place.parameter != "weight":
        return
    expert, projection = place.module.split(".")[2:]
    whole = replace(place, module=stack)
    for name in _stored(whole, checkpoint):
        _, *matrix = checkpoint[name].shape
        transposed = _is_transposed(whole, name, checkpoint)
        rows = matrix[1 if transposed else 0] // (2 if stack == GATE_UP else 1)
        if int(expert) < checkpoint[name].shape[0]:
            yield TensorSlice(
                name=name,
                slab=int(expert),
                onto=rows if projection == "up_proj" else 0,
                rows=rows,
                transposed=transposed,
            )


def _is_transposed(place: ParsedName, name: str, checkpoint: Checkpoint) -> bool:
    channels = channels_of(place, checkpoint[name].shape, checkpoint.config)
    return channels is not None and channels.axis == (1 if place.module == DOWN else 2)
