"""The linear layers of a Qwen decoder that are quantized, as stored in a checkpoint, and their weights.

An expert that is stored in a stack is a linear layer like any other here: a view of the stack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.channels import channels_of
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.layers import Matrix, layer_matrices, number_of_layers
from qwen_pipeline.qwen.names import DOWN, ParsedName, decoder_prefix, parse_names, stack_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlice:
    """The part of a stack of experts that holds one weight.

    Attributes:
        expert: Index of the expert.
        start: Its first output in the expert's matrix; ``up`` follows ``gate``.
        transposed: Whether inputs come before outputs in the stack.
        stack: Shape of the whole stack.
    """

    expert: int
    start: int
    transposed: bool
    stack: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer.

    Attributes:
        module: Its name without ``.weight``; the prefix of its codes' names.
        layer: Number of the decoder layer.
        kind: Path inside the layer, such as ``mlp.experts.7.gate_proj``.
        tensor: Name of the stored tensor that holds the weight.
        expert_slice: The part of that tensor that is the weight; None if it is the whole tensor.
    """

    module: str
    layer: int
    kind: str
    out_features: int
    in_features: int
    tensor: str
    expert_slice: ExpertSlice | None = None

    @property
    def is_expert(self) -> bool:
        """Return whether it belongs to a routed expert (not a shared one)."""
        return stack_of(self.kind) is not None


def decoder_linears(checkpoint: Checkpoint) -> list[Linear]:
    """Return the linear layers that quantization turns into codes, in the order of the forward pass.

    Routers, gates, embeddings, towers and draft heads are not included.

    Raises:
        InputRefused: The family is unknown.
        CheckpointRefused: A tensor is unknown, or a weight is missing or does not have the shape in the config;
            the message names them.
    """
    names, config = parse_names(checkpoint), checkpoint.config
    prefix = decoder_prefix(checkpoint)
    linears: list[Linear] = []
    wrong: list[str] = []
    for layer in range(number_of_layers(config)):
        for kind, matrix in _quantized(layer_matrices(config, layer)):
            module = f"{prefix}layers.{layer}.{kind}"
            unstacked, stack = (
                names.get(ParsedName(part="decoder", layer=layer, module=path, parameter="weight"))
                for path in (kind, stack_of(kind) or "")
            )
            if not (tensor := unstacked or stack):
                wrong.append(f"{module} is missing")
                continue
            shape = checkpoint[tensor].shape
            expert_slice = None if unstacked else _expert_slice(kind, matrix, shape, config)
            if shape != (expert_slice.stack if expert_slice else (matrix.out_features, matrix.in_features)):
                wrong.append(
                    f"{tensor} is {list(shape)}, expected {matrix.out_features} x {matrix.in_features} for {module}"
                )
            linears.append(
                Linear(
                    module=module,
                    layer=layer,
                    kind=kind,
                    out_features=matrix.out_features,
                    in_features=matrix.in_features,
                    tensor=tensor,
                    expert_slice=expert_slice,
                )
            )
    if wrong:
        raise CheckpointRefused(
            f"The decoder's weights do not match its config: {listed(wrong)}.",
            remedy="Fetch the checkpoint again, or correct its config: weights and config must belong to one model.",
        )
    return linears


def load_weight(checkpoint: Checkpoint, linear: Linear, rows: slice | None = None) -> "torch.Tensor":
    """Return the weight of a linear layer [O, I], or only ``rows`` of its outputs.

    For a view of a stack, the whole expert is read, because the rows of a stack are experts.
    """
    if (part := linear.expert_slice) is None:
        return checkpoint.load(linear.tensor, rows)
    expert = checkpoint.load(linear.tensor, slice(part.expert, part.expert + 1))[0]
    w_OI = (expert.T if part.transposed else expert)[part.start : part.start + linear.out_features]
    return w_OI if rows is None else w_OI[rows]


def _quantized(matrices: Sequence[Matrix]) -> Iterator[tuple[str, Matrix]]:
    """Yield (kind, matrix) for all quantized matrices, one expert after the other."""
    experts = [matrix for matrix in matrices if matrix.count > 1 or "*" in matrix.kind]
    for matrix in matrices:
        if matrix in experts:
            if matrix is experts[0]:
                yield from ((m.kinds()[expert], m) for expert in range(matrix.count) for m in experts)
        elif matrix.quantized:
            yield matrix.kind, matrix


def _expert_slice(kind: str, matrix: Matrix, shape: tuple[int, ...], config: Config) -> ExpertSlice:
    stack, outputs = stack_of(kind), matrix.out_features
    channels = channels_of(ParsedName(part="decoder", module=str(stack), parameter="weight"), shape, config)
    assert channels, f"{stack} has no channels"
    rows = outputs * channels.halves
    transposed = channels.axis == (1 if stack == DOWN else 2)
    sides = (matrix.in_features, rows) if transposed else (rows, matrix.in_features)
    return ExpertSlice(
        expert=int(kind.split(".")[2]),
        start=outputs if kind.endswith(".up_proj") else 0,
        transposed=transposed,
        stack=(matrix.count, *sides),
    )
