"""Stored locations of a model's in-memory parameters: a whole tensor, a part of one, or several tensors.

The two layouts differ only for experts: a stack in memory may be stored as one matrix per expert and projection, a
single expert's matrix may be rows of a stored stack, and a stack may be stored with its matrices transposed.
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
    """Rows of one matrix in memory, and their stored location.

    Attributes:
        name: The stored tensor.
        expert: Index of the matrix in the parameter in memory.
        first_row: First row of that matrix in this slice.
        stack_index: Index of the matrix in the stored tensor; None if that is not a stack.
        stored_row: Row of the stored matrix that corresponds to ``first_row``.
        rows: Number of rows; None for all.
        transposed: Whether the stored matrices are transposed.
    """

    name: str
    expert: int = 0
    first_row: int = 0
    stack_index: int | None = None
    stored_row: int = 0
    rows: int | None = None
    transposed: bool = False


def slices_of(parameter: str, checkpoint: Checkpoint) -> list[TensorSlice]:
    """Return the stored slices of an in-memory parameter: empty if it is not stored, overlapping if it is stored twice.

    Args:
        parameter: Such as ``model.layers.0.self_attn.q_proj.weight`` or ``model.layers.0.mlp.experts.gate_up_proj``.
        checkpoint: Its tensors may have any of the family's spellings.
    """
    try:
        parsed = parse_name(parameter, checkpoint.config)
    except CheckpointRefused:
        return []
    if stored := _stored_names(parsed, checkpoint):
        return [part for name in stored for part in _whole_tensor(parsed, name, checkpoint)]
    if parsed.module in FUSED:
        return list(_unstacked_experts(parsed, checkpoint))
    return list(_stack_rows(parsed, checkpoint))


def _stored_names(parsed: ParsedName, checkpoint: Checkpoint) -> list[str]:
    return [name for name in spellings(parsed, require_family(checkpoint.config)) if name in checkpoint]


def _whole_tensor(parsed: ParsedName, name: str, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    if parsed.module not in FUSED:
        yield TensorSlice(name=name)
        return
    transposed = _is_transposed(parsed, name, checkpoint)
    for expert in range(checkpoint[name].shape[0]):
        yield TensorSlice(name=name, expert=expert, stack_index=expert, transposed=transposed)


def _unstacked_experts(parsed: ParsedName, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    """Yield the single-expert tensors that a stack in memory is stored as."""
    projections = ("down_proj",) if parsed.module == DOWN else ("gate_proj", "up_proj")
    for expert in range(number_of_experts(checkpoint.config)):
        first_row = 0
        for projection in projections:
            part = replace(parsed, module=f"mlp.experts.{expert}.{projection}")
            for name in _stored_names(part, checkpoint):
                rows = checkpoint[name].shape[0]
                yield TensorSlice(name=name, expert=expert, first_row=first_row, rows=rows)
                first_row += rows


def _stack_rows(parsed: ParsedName, checkpoint: Checkpoint) -> Iterator[TensorSlice]:
    """Yield the rows of a stored stack that correspond to one expert's matrix in memory."""
    stack = stack_of(parsed.module)
    if stack is None or parsed.parameter != "weight":
        return
    expert, projection = parsed.module.split(".")[-2:]
    whole = replace(parsed, module=stack)
    for name in _stored_names(whole, checkpoint):
        _, *matrix = checkpoint[name].shape
        transposed = _is_transposed(whole, name, checkpoint)
        rows = matrix[1 if transposed else 0] // (2 if stack.endswith(GATE_UP) else 1)
        if int(expert) < checkpoint[name].shape[0]:
            yield TensorSlice(
                name=name,
                stack_index=int(expert),
                stored_row=rows if projection == "up_proj" else 0,
                rows=rows,
                transposed=transposed,
            )


def _is_transposed(parsed: ParsedName, name: str, checkpoint: Checkpoint) -> bool:
    channels = channels_of(parsed, checkpoint[name].shape, checkpoint.config)
    return channels is not None and channels.axis == (1 if parsed.module == DOWN else 2)
