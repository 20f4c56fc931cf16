"""What each rank of a tensor-parallel engine takes of a packed layer, and the weight that all ranks compute with.

Loaders cut by rows or columns: of L elements and for n ranks, rank r takes ``L // n`` from ``r * (L // n)`` on, of
codes and scales alike (vLLM's ``PackedvLLMParameter`` and ``GroupQuantScaleParameter``; SGLang's are copies). What is
left over belongs to nobody, and a rank applies its scales to its inputs in the order in which it holds them.
"""

from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.transforms.code_parts import Dimension
from qwen_pipeline.transforms.gptq_codes import PackedLinear, in_order

if TYPE_CHECKING:
    import torch


def rank_part(packed: PackedLinear, dimension: Dimension, rank: int, ranks: int) -> PackedLinear:
    """Return what one rank holds: a share of the inputs (``down_proj``, ``o_proj``) or of the outputs (all others).

    With act-order, engines that can share inputs at all (vLLM's Marlin) give each rank all scales and its part of
    ``g_idx``; so they do where one scale covers all inputs.
    """
    if dimension == "out":
        return PackedLinear(
            format=packed.format,
            qweight=_share(packed.qweight, 1, rank, ranks),
            qzeros=_share(packed.qzeros, 1, rank, ranks),
            scales=_share(packed.scales, 1, rank, ranks),
            g_idx=packed.g_idx,
        )
    qweight = _share(packed.qweight, 0, rank, ranks)
    inputs = len(qweight) * packed.format.codes_per_word
    first = rank * inputs
    if len(packed.scales) == 1 or not packed.is_in_order:
        qzeros, scales, g_idx = packed.qzeros, packed.scales, packed.g_idx[first : first + inputs]
    else:
        qzeros, scales = (_share(part, 0, rank, ranks) for part in (packed.qzeros, packed.scales))
        g_idx = in_order(inputs, packed.format.group_size).clamp(max=max(len(scales) - 1, 0))
    return PackedLinear(format=packed.format, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)


def weight_over_ranks(packed: PackedLinear, dimension: Dimension, ranks: int) -> LazyTensor:
    """Return the weight that ``ranks`` ranks compute with together, float32 [O, I].

    A rank whose inputs reach past its last scale reads beyond its end; here it reads the last one again, which is the
    kindest thing that can happen. Inputs and outputs that no rank holds are missing from the result.
    """
    import torch

    parts = [rank_part(packed, dimension, rank, ranks) for rank in range(ranks)]
    outputs, inputs = parts[0].qweight.shape[1], len(parts[0].g_idx)

    def read_inputs(start: int, stop: int) -> "torch.Tensor":
        return torch.cat([part.weight_rows(start, stop) for part in parts], dim=1)

    def read_outputs(start: int, stop: int) -> "torch.Tensor":
        spans = [(max(start - rank * outputs, 0), min(stop - rank * outputs, outputs)) for rank in range(ranks)]
        return torch.cat(
            [part.weight_rows(*span) for part, span in zip(parts, spans, strict=True) if span[0] < span[1]]
        )

    if dimension == "in":
        return LazyTensor(spec=TensorSpec(dtype="F32", shape=(outputs, inputs * ranks)), read=read_inputs)
    return LazyTensor(spec=TensorSpec(dtype="F32", shape=(outputs * ranks, inputs)), read=read_outputs)


def _share(tensor: "torch.Tensor", axis: int, rank: int, ranks: int) -> "torch.Tensor":
    length = tensor.shape[axis] // ranks
    return tensor.narrow(axis, rank * length, length)
