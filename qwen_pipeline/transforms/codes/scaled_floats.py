"""Weights of 8-bit floats and their scales: one for a tensor, for an output, or for a block of both axes.

``W[o, i] = w[o, i] * scale[o // rows, i // columns]``. Published FP8 models of Qwen have blocks of 128 x 128
and name the scales ``weight_scale_inv`` (https://github.com/huggingface/transformers,
``integrations/finegrained_fp8.py``); compressed-tensors and modelopt name them ``weight_scale``. Stacks of experts have
an axis in front of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.config_types import is_size
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch

FLOATS = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
"""Endings of the names of scales, after the name of the weight."""
OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
"""Names of scales that are not of weights: they have no meaning in full precision."""


def scale_of(checkpoint: Checkpoint, name: str) -> str:
    """Return the name of the scale of a weight of 8-bit floats.

    Raises:
        CheckpointRefused: There is none, or there are several.
    """
    found = [name + ending for ending in SCALES if name + ending in checkpoint]
    if len(found) == 1:
        return found[0]
    raise CheckpointRefused(
        f"{name}, {checkpoint[name].dtype}, has {len(found)} scales; expected one, {name}{SCALES[0]} or {SCALES[1]}.",
        remedy="Fetch the checkpoint again, or use the full-precision model that it was made from.",
    )


def scaled(checkpoint: Checkpoint, name: str, dtype: str, settings: Mapping[str, Any]) -> LazyTensor:
    """Return a weight of 8-bit floats times its scale, computed in float32 and rounded once to ``dtype``.

    Raises:
        CheckpointRefused: The scale's shape does not fit the weight's.
    """
    weight, scale_name = checkpoint.tensors[name], scale_of(checkpoint, name)
    scale = checkpoint.tensors[scale_name]
    spec = replace(weight.spec, dtype=dtype)
    grid = _grid(spec.shape, scale.spec.shape)
    block = _block(spec.shape, grid, settings.get("weight_block_size")) if grid else None
    if grid is None or block is None or scale.spec.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointRefused(
            f"{scale_name} is {scale.spec.dtype} {list(scale.spec.shape)}, which does not fit {name}"
            f" {list(spec.shape)} in blocks of {settings.get('weight_block_size') or 'equal size'}.",
            remedy="Use the full-precision model that the checkpoint was made from.",
        )
    (rows, columns), shape = block, grid

    def read(start: int, stop: int) -> "torch.Tensor":
        import torch

        values = weight.read(start, stop).float()
        scales = scale.read(0, scale.spec.rows).float().reshape(shape)
        if len(spec.shape) == 2:
            scales = scales[torch.arange(start, stop) // rows]
        else:
            scales = scales[start:stop].repeat_interleave(rows, 1)[:, : spec.shape[1]]
        values *= scales.repeat_interleave(columns, -1)[..., : spec.shape[-1]]
        return values.to(spec.torch_dtype)

    return LazyTensor(spec=spec, read=read)


def _grid(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of a scale, with as many axes as the weight; None if it does not fit."""
    if len(shape) not in (2, 3):
        return None
    if prod(scale) == 1:
        return (*shape[:-2], 1, 1) if len(shape) == 2 else None
    if len(scale) == 1 and tuple(scale) == tuple(shape[:1]):
        return (*scale, *(1 for _ in shape[1:]))
    return tuple(scale) if len(scale) == len(shape) and tuple(scale[:-2]) == tuple(shape[:-2]) else None


def _block(shape: Sequence[int], grid: Sequence[int], stated: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block, those that the config states if they give this grid."""
    sides, parts = tuple(shape[-2:]), tuple(grid[-2:])
    if 0 in (*sides, *parts):
        return None
    sizes = cast("list[object]", stated) if isinstance(stated, list) else []
    block = [min(size, side) for size, side in zip(sizes, sides, strict=False) if is_size(size)]
    if len(sizes) == len(block) == 2 and all(
        ceil(side / size) == n for side, size, n in zip(sides, block, parts, strict=True)
    ):
        return block[0], block[1]
    if any(side % number for side, number in zip(sides, parts, strict=True)):
        return None
    return sides[0] // parts[0], sides[1] // parts[1]
