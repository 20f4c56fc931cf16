"""The shard of a packed layer on each rank of a tensor-parallel engine, and the weight that all ranks compute with.

Loaders shard by rows or columns: of L elements, rank r of n gets ``L // n``, starting at ``r * (L // n)``, of codes and
scales alike (vLLM's ``PackedvLLMParameter`` and ``GroupQuantScaleParameter``; SGLang's are copies). No rank
gets the remainder. A rank applies its scales to its inputs in order: for I inputs in groups of g it has ``I // g``
scales, so that after a group which straddles two ranks, inputs are multiplied by the scales of other groups.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.transforms.codes.gptq import PackedLinear, in_order
from qwen_pipeline.transforms.codes.parts import Dimension

if TYPE_CHECKING:
    import torch


def rank_part(packed: PackedLinear, dimension: Dimension, rank: int, ranks: int) -> PackedLinear:
    """Return the shard of one rank: of the inputs (``down_proj``, ``o_proj``) or of the outputs (all others).

    With act-order, engines that can shard inputs at all (vLLM's Marlin) give each rank all scales and its part of
    ``g_idx``, and likewise if one scale covers all inputs. A rank with more inputs than its scales cover reads beyond
    their end; here it reads the last one again, which is the best case. A rank that holds less than a group has no
    scale: its weights are zero.
    """
    if dimension == "out":
        qweight, qzeros, scales = (
            _share(part, 1, rank, ranks) for part in (packed.qweight, packed.qzeros, packed.scales)
        )
        return replace(packed, qweight=qweight, qzeros=qzeros, scales=scales)
    qweight = _share(packed.qweight, 0, rank, ranks)
    inputs, size = len(qweight) * packed.format.codes_per_word, packed.format.group_size
    if packed.format.group_size == -1 or not packed.is_in_order:
        return replace(packed, qweight=qweight, g_idx=packed.g_idx[rank * inputs : (rank + 1) * inputs])
    if not (groups := inputs // size):
        zero_scale = packed.scales[:1] * 0
        return replace(
            packed, qweight=qweight, qzeros=packed.qzeros[:1], scales=zero_scale, g_idx=packed.g_idx[:inputs] * 0
        )
    qzeros, scales = (part[rank * groups : (rank + 1) * groups] for part in (packed.qzeros, packed.scales))
    return replace(
        packed,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=in_order(inputs, size).clamp(max=groups - 1).to(packed.g_idx.device),
    )


def first_outputs(packed: PackedLinear, count: int) -> PackedLinear:
    """Return the layer with its first outputs only, ``count`` of them or all; a multiple of the codes in a word."""
    words = count // packed.format.codes_per_word
    return replace(
        packed, qweight=packed.qweight[:, :count], qzeros=packed.qzeros[:, :words], scales=packed.scales[:, :count]
    )


def effective_g_idx(packed: PackedLinear, ranks: int) -> "torch.Tensor":
    """Return the group whose scale multiplies each input when ``ranks`` ranks share the inputs, int32 [I].

    The layer with these indices as its ``g_idx`` is what all ranks compute together.

    Raises:
        ValueError: The ranks do not hold all inputs, or each holds less than a group, which ``g_idx`` cannot express.
    """
    import torch

    if packed.format.group_size == -1 or not packed.is_in_order:
        return packed.g_idx
    inputs, size = len(packed.g_idx) // ranks, packed.format.group_size
    groups = inputs // size
    if inputs * ranks != len(packed.g_idx) or not groups:
        raise ValueError(
            f"{len(packed.g_idx)} inputs in groups of {size} cannot be split into {ranks} shares of at least a group"
        )
    own = in_order(inputs, size).clamp(max=groups - 1).to(packed.g_idx.device)
    return torch.cat([own + rank * groups for rank in range(ranks)])


def weight_over_ranks(packed: PackedLinear, dimension: Dimension, ranks: int) -> LazyTensor:
    """Return the weight that ``ranks`` ranks compute with together, float32 [O, I].

    Inputs and outputs that no rank holds are absent from the result.
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
