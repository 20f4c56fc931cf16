"""Full-precision weights as QLoRA rounds them, with bitsandbytes' NF4: an adapter meets what it was trained on.

A weight is cut into blocks of 64 values in their order. A value is divided by its block's largest magnitude and
replaced by the nearest of 16 quantiles of a normal distribution (arXiv:2305.14314;
https://github.com/bitsandbytes-foundation/bitsandbytes, ``functional.py`` and ``backends/default/ops.py``, 0.50). With
double quantization the magnitudes, less their mean, are themselves rounded to 8 bits in blocks of 256. All is computed
in float32 and rounded once.

With double quantization single magnitudes may differ from those of a training: a GPU adds the mean up in another order,
and bitsandbytes' kernel for CPUs looks codes up in a table that is not exact where two codes are almost equally near.
"""

from functools import cache
from math import ceil, prod
from threading import Lock
from typing import TYPE_CHECKING, Literal

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.names import parse_name

if TYPE_CHECKING:
    import torch

Statistics = Literal["single", "double"]
BLOCK = 64
OUTER_BLOCK = 256
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38
_OTHER_PARTS = ("vision", "audio", "talker", "vocoder")


def rounded_to_nf4(base: Checkpoint, statistics: Statistics) -> Checkpoint:
    """Return a base whose decoder's linear layers are rounded to NF4 and back.

    Raises:
        QuantizedInputRefused: The base is quantized already.
        InputRefused: The base has experts, towers or layers without attention: which of their layers a training rounded
            depends on its version of Transformers and its settings.
    """
    require_full_precision(
        base,
        because="QLoRA rounds the full-precision base.",
        remedy="Pass the full-precision base. If the adapter was trained on these very codes, read them as they are:"
        " --base-dequantize.",
    )
    linears = decoder_linears(base)
    parts = {parse_name(name, base.config).part for name in base}
    others = [part for part in _OTHER_PARTS if part in parts]
    if others or any(linear.is_expert or linear.kind.startswith("linear_attn") for linear in linears):
        raise InputRefused(
            f"The layers of {base.config.get('model_type')} that QLoRA rounds are not known: it has"
            f" {', '.join(others) or 'experts or delta nets'}.",
            remedy="Merge into the base as it is: leave out --base-nf4. Or merge with the training's own tools.",
        )
    names = {linear.tensor for linear in linears}
    return base.replace(tensors={name: _rounded(base.tensors[name], statistics) for name in names})


def _rounded(weight: LazyTensor, statistics: Statistics) -> LazyTensor:
    magnitudes = _Magnitudes(weight)
    width = weight.spec.shape[1]

    def read(start: int, stop: int) -> "torch.Tensor":
        first, blocks = _whole_blocks(weight, start, stop)
        largest = blocks.abs().amax(dim=1)
        codes = _nearest(blocks, largest, _quantiles())
        if statistics == "double":
            largest = magnitudes.rounded[first // BLOCK :][: len(blocks)]
        values = (_quantiles()[codes] * largest[:, None]).reshape(-1)[start * width - first :]
        return values[: (stop - start) * width].reshape(stop - start, width).to(weight.spec.torch_dtype)

    return LazyTensor(spec=weight.spec, read=read)


class _Magnitudes:
    """The largest magnitude of each block of a weight; computed in one pass, when they are first needed."""

    def __init__(self, weight: LazyTensor) -> None:
        self._weight = weight
        self._lock = Lock()
        self._rounded: torch.Tensor | None = None

    @property
    def rounded(self) -> "torch.Tensor":
        """The magnitudes after double quantization, float32, one for each block."""
        with self._lock:
            if self._rounded is None:
                self._rounded = self._round()
            return self._rounded

    def _round(self) -> "torch.Tensor":
        import torch

        spec = self._weight.spec
        magnitudes = torch.empty(ceil(prod(spec.shape) / BLOCK))
        with hashing_paused():
            for rows in block_ranges(spec):
                first, blocks = _whole_blocks(self._weight, *rows)
                magnitudes[first // BLOCK :][: len(blocks)] = blocks.abs().amax(dim=1)
        mean = magnitudes.mean()
        outer = _in_blocks(magnitudes - mean, OUTER_BLOCK)
        largest = outer.abs().amax(dim=1)
        codes = _nearest(outer, largest, _dynamic_codes())
        return (_dynamic_codes()[codes] * largest[:, None]).reshape(-1)[: len(magnitudes)] + mean


def _whole_blocks(weight: LazyTensor, start: int, stop: int) -> tuple[int, "torch.Tensor"]:
    """Return the first value's number and the values [blocks, 64], float32, of the blocks that some rows touch."""
    rows, width = weight.spec.shape
    first = start * width // BLOCK * BLOCK
    last = min(ceil(stop * width / BLOCK) * BLOCK, rows * width)
    row = first // width
    values = weight.read(row, ceil(last / width)).float().reshape(-1)
    return first, _in_blocks(values[first - row * width : last - row * width], BLOCK)


def _in_blocks(values: "torch.Tensor", size: int) -> "torch.Tensor":
    """Return values in rows of ``size``; the last row ends with zeros."""
    import torch

    return torch.nn.functional.pad(values, (0, -len(values) % size)).reshape(-1, size)


def _nearest(blocks: "torch.Tensor", largest: "torch.Tensor", codes: "torch.Tensor") -> "torch.Tensor":
    """Return the index of the code nearest to each value, relative to its block's largest magnitude."""
    import torch

    relative = (blocks * (1 / largest.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
    return torch.bucketize(relative, (codes[1:] + codes[:-1]) / 2)


@cache
def _quantiles() -> "torch.Tensor":
    import torch

    return torch.tensor(QUANTILES)


@cache
def _dynamic_codes() -> "torch.Tensor":
    """Return bitsandbytes' 256 codes: means of linear intervals within each power of ten (arXiv:1511.04561)."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(values))
