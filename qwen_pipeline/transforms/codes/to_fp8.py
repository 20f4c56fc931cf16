"""Rounding of weights to 8-bit floats: each scale maps the largest magnitude of its weights to the largest float.

``scale = max |W| / 448``, ``w = W / scale``, both in float32, and ``w`` is rounded once, to the nearest 8-bit float.
Weights that are all zero get the scale 2**-23, as in compressed-tensors. No data is needed: blocks of rows are computed
as the writer asks for them.
"""

import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, ReadRows
from qwen_pipeline.qwen.linears import Linear, load_weight
from qwen_pipeline.qwen.methods import Fp8Layout
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.transforms.codes.fp8 import LARGEST, Fp8Format

if TYPE_CHECKING:
    import torch

ROWS = 128
"""Rows whose scales are computed at once: those of a block."""
CACHED_BYTES = 2**19
"""Float32 values that are computed at once: they stay in a core's cache, and their memory is not mapped anew."""
SCALE_OF_ZEROS = 2.0**-23


def as_fp8(source: Checkpoint, linears: Collection[Linear], layout: Fp8Layout) -> Checkpoint:
    """Return ``source`` with the weights of ``linears`` as 8-bit floats; a stack of experts becomes one layer each.

    The config names every other linear layer. Tensors keep their order and shards; scales are at the end of their
    shard, so that all of its weights are computed when the scales are.
    """
    form = Fp8Format(layout=layout)
    codes: dict[str, dict[str, LazyTensor]] = {}
    scales: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for linear in linears:
        rounded = _Rounded(source, linear, form)
        codes.setdefault(linear.tensor, {})[f"{linear.module}.weight"] = rounded.codes
        scales[name := f"{linear.module}.{layout.scale}"] = rounded.scales
        shards[name] = source.shards[linear.tensor]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        for new_name, new_tensor in codes.get(name, {name: tensor}).items():
            tensors[new_name], shards[new_name] = new_tensor, source.shards[name]
    settings = form.settings(excluded_modules(source, {linear.tensor for linear in linears}, layout))
    config = {**source.config, "quantization_config": settings}
    return replace(source, tensors={**tensors, **scales}, shards=shards, config=config, config_bytes=None)


def excluded_modules(source: Checkpoint, rounded: Collection[str], layout: Fp8Layout) -> list[str]:
    """Return the entries that name the linear layers in full precision, in the order of the checkpoint.

    Transformers' layout takes whole names (vLLM compares them, and maps their beginnings to its own). In that of
    compressed-tensors, towers and draft heads are regular expressions, because its loaders compare names of modules,
    which for towers differ from the stored ones. A tied output head is not stored, but engines look for it. Norms are
    no linear layers: some of Qwen's releases name them, but no engine looks for them.

    Args:
        source: The checkpoint before rounding.
        rounded: The tensors that are rounded.
        layout: The layout.
    """
    entries: dict[str, None] = {}
    head = False
    for name, spec in source.items():
        parsed = parse_name(name, source.config)
        is_linear = parsed.parameter == "weight" and len(spec.shape) > 1 and "embed" not in parsed.module
        if name in rounded or not is_linear:
            continue
        head |= parsed.part == "head"
        outside = parsed.part not in ("decoder", "head", "norm")
        if outside and layout.container == "compressed-tensors":
            root = "mtp" if parsed.part == "mtp" else parsed.module.partition(".")[0]
            entries[f"re:.*{re.escape(root)}.*"] = None
        else:
            entries[name.removesuffix(".weight")] = None
    return [*entries, *([] if head else ["lm_head"])]


class _Rounded:
    """A layer whose weight is rounded; scales are kept, so that the weight is read only once for both tensors."""

    def __init__(self, source: Checkpoint, linear: Linear, form: Fp8Format) -> None:
        specs = form.code_specs(linear.out_features, linear.in_features)
        self._rows, self._outputs, self._block = weight_rows(source, linear), linear.out_features, form.layout.block
        self._is_whole = linear.expert_slice is None
        self._parts = _Parts()
        self.codes = LazyTensor(spec=specs["weight"], read=self._read_codes)
        self.scales = LazyTensor(spec=specs[form.layout.scale], read=self._read_scales)

    def _read_codes(self, start: int, stop: int) -> "torch.Tensor":
        import torch

        first, last = start // ROWS * ROWS, min(-(-stop // ROWS) * ROWS, self._outputs)
        weight_OI = self._load(first, last, again=not self._is_whole or (first, last) != (start, stop))
        inputs = weight_OI.shape[1]
        codes_OI = empty((stop - start, inputs), torch.float8_e4m3fn)
        for at in range(first, last, ROWS):
            part_OI = weight_OI[at - first : at - first + ROWS]
            scales = self._parts.get(at // ROWS, partial(self._scales_of, part_OI))
            low, high = max(start, at), min(stop, at + ROWS)
            rows = slice(low - at, high - at)
            _divide(part_OI[rows], self._spread(scales, rows, inputs), codes_OI[low - start : high - start])
        return codes_OI

    def _read_scales(self, start: int, stop: int) -> "torch.Tensor":
        import torch

        rows = 1 if self._block else ROWS
        parts = range(start // rows, -(-stop // rows))
        found = [self._parts.get(part, partial(self._compute, part)) for part in parts]
        return torch.cat(found)[start - parts.start * rows :][: stop - start]

    def _compute(self, part: int) -> "torch.Tensor":
        return self._scales_of(self._load(part * ROWS, min((part + 1) * ROWS, self._outputs), again=True))

    def _load(self, first: int, last: int, *, again: bool) -> "torch.Tensor":
        """Read rows; ``again`` if they may be read by another block too, so that they cannot be hashed meanwhile."""
        with hashing_paused() if again else nullcontext():
            return self._rows(first, last)

    def _scales_of(self, part_OI: "torch.Tensor") -> "torch.Tensor":
        """Return the scales of up to 128 rows: [O, 1], or [1, I / block]."""
        import torch

        if self._block is None:
            largest = torch.cat([rows.abs().amax(dim=1, keepdim=True) for rows in _cached(part_OI)])
        else:
            columns = torch.stack([rows.abs().amax(dim=0) for rows in _cached(part_OI)]).amax(dim=0)
            largest = torch.nn.functional.pad(columns, (0, -len(columns) % self._block))
            largest = largest.reshape(1, -1, self._block).amax(dim=2)
        scales = largest.float() / LARGEST
        return torch.where(scales == 0, SCALE_OF_ZEROS, scales)

    def _spread(self, scales: "torch.Tensor", rows: slice, inputs: int) -> "torch.Tensor":
        """Return the scales of rows of a part, in a shape by which the rows can be divided."""
        if self._block is None:
            return scales[rows]
        return scales.repeat_interleave(self._block, dim=1)[:, :inputs].expand(rows.stop - rows.start, inputs)


def weight_rows(source: Checkpoint, linear: Linear) -> ReadRows:
    """Return a function that reads rows of a layer's weight; of an expert in a stack, no more than these if it can."""
    part, tensor = linear.expert_slice, source.tensors[linear.tensor]
    if part is None:
        return tensor.read
    if part.transposed or not (stored := tensor.stored):
        return lambda start, stop: load_weight(source, linear, slice(start, stop))
    width = linear.in_features
    first = part.expert * part.stack[1] + part.start
    return lambda start, stop: stored.load((first + start) * width, (first + stop) * width).reshape(-1, width)


def _divide(weight_OI: "torch.Tensor", scales: "torch.Tensor", codes_OI: "torch.Tensor") -> None:
    """Write rounded quotients into ``codes_OI``."""
    import torch

    for weight, scale, codes in zip(*map(_cached, (weight_OI, scales.expand_as(weight_OI), codes_OI)), strict=True):
        codes.copy_(weight.to(torch.float32, copy=True).div_(scale))


def _cached(rows: "torch.Tensor") -> "Sequence[torch.Tensor]":
    """Return rows in parts of at most :data:`CACHED_BYTES` of float32 values, or of one row."""
    return rows.split(max(1, CACHED_BYTES // (4 * rows.shape[1])))


class _Parts:
    """The scales of a layer, part by part; each is computed once, by the thread that asks for it first."""

    def __init__(self) -> None:
        self._found: dict[int, Future[torch.Tensor]] = {}
        self._lock = Lock()

    def get(self, part: int, compute: "Callable[[], torch.Tensor]") -> "torch.Tensor":
        with self._lock:
            is_first = part not in self._found
            found = self._found.setdefault(part, Future())
        if is_first:
            try:
                found.set_result(compute())
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()
