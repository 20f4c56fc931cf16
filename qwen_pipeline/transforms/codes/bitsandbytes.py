"""Weights in bitsandbytes' 4-bit codes, as Transformers stores them: ``<weight>`` and what restores it beside it.

``<weight>`` holds two codes in a byte, the first in the high bits, in the order of the weight's values, and
``<weight>.quant_map`` the values of the codes; ``<weight>.absmax`` has a factor for each block. With double
quantization the factors are codes too: ``.nested_quant_map``, ``.nested_absmax`` and an offset. Shape and sizes are
JSON in the bytes of ``<weight>.quant_state.bitsandbytes__nf4`` or ``__fp4``
(https://github.com/bitsandbytes-foundation/bitsandbytes, ``functional.py``, ``QuantState.as_dict``, 0.50).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.files import parse_json
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import ITEM_BYTES, TensorSpec, as_bytes
from qwen_pipeline.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)
_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def stored_in_4_bits(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the weights in 4-bit codes."""
    states = [(name, f".{state}") for name in checkpoint for state in _STATES if name.endswith(f".{state}")]
    return [name.removesuffix(state) for name, state in states]


def parts_of(checkpoint: Checkpoint, name: str) -> set[str]:
    """Return the names of the tensors beside a weight in 4-bit codes."""
    return {f"{name}.{part}" for part in _PARTS} & checkpoint.keys()


def restored(checkpoint: Checkpoint, name: str) -> LazyTensor:
    """Return a weight in 4-bit codes in the dtype that was quantized, computed in float32 and rounded once.

    Raises:
        CheckpointRefused: A part is missing, or does not have the size that the weight needs.
    """
    state = _state(checkpoint, name)
    codes = checkpoint.tensors[name]
    per_item = ITEM_BYTES[codes.spec.dtype]
    width, size = prod(state.spec.shape[1:]), state.block

    def read(start: int, stop: int) -> "torch.Tensor":
        import torch

        low, high = start * width // 2 // per_item, ceil(ceil(stop * width / 2) / per_item)
        packed = torch.frombuffer(bytearray(as_bytes(codes.read(low, high))), dtype=torch.uint8)
        both = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
        numbers = torch.arange(start * width, stop * width)
        block = start * width // size
        factors = state.factors(block, ceil(stop * width / size))
        values = state.values()[both[numbers - low * per_item * 2]] * factors[numbers // size - block]
        return values.reshape(stop - start, *state.spec.shape[1:]).to(state.spec.torch_dtype)

    return LazyTensor(spec=state.spec, read=read)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """The settings of one weight.

    Attributes:
        spec: Dtype and shape of the weight.
        block: Number of values that share a factor.
        nested: Number of factors that share an outer factor, and the offset of all; None without double quantization.
    """

    checkpoint: Checkpoint
    name: str
    spec: TensorSpec
    block: int
    nested: tuple[int, float] | None

    def part(self, part: str, start: int, stop: int) -> "torch.Tensor":
        return self.checkpoint.load(f"{self.name}.{part}", slice(start, stop))

    def values(self) -> "torch.Tensor":
        """Return the value of each code, float32 [16]."""
        return self.part("quant_map", 0, 16).float()

    def factors(self, start: int, stop: int) -> "torch.Tensor":
        """Return the factors of blocks ``start:stop``, float32."""
        stored = self.part("absmax", start, stop)
        if self.nested is None:
            return stored.float()
        size, offset = self.nested
        first = start // size
        outer = self.part("nested_absmax", first, ceil(stop / size)).float().repeat_interleave(size)
        outer = outer[start - first * size :][: len(stored)]
        return self.part("nested_quant_map", 0, 256).float()[stored.long()] * outer + offset


def _state(checkpoint: Checkpoint, name: str) -> _State:
    stored = next(f"{name}.{state}" for state in _STATES if f"{name}.{state}" in checkpoint)
    try:
        settings: dict[str, Any] = parse_json(bytes(as_bytes(checkpoint.load(stored))))
        shape = tuple(int(length) for length in settings["shape"])
        is_nested = "nested_blocksize" in settings
        state = _State(
            checkpoint=checkpoint,
            name=name,
            spec=TensorSpec(dtype=_DTYPES[settings["dtype"]], shape=shape),
            block=int(settings["blocksize"]),
            nested=(int(settings["nested_blocksize"]), float(settings["nested_offset"])) if is_nested else None,
        )
        _require_sizes(state)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointRefused(
            f"{name} is in 4-bit codes of bitsandbytes, but what restores it is damaged or missing: {error!r}.",
            remedy="Fetch the checkpoint again, or use the full-precision model that it was made from.",
        ) from error
    return state


def _require_sizes(state: _State) -> None:
    blocks = ceil(prod(state.spec.shape) / state.block)
    expected = {"absmax": blocks, "quant_map": 16}
    if state.nested:
        expected |= {"nested_absmax": ceil(blocks / state.nested[0]), "nested_quant_map": 256}
    for part, count in expected.items():
        found = state.checkpoint[f"{state.name}.{part}"].shape
        if prod(found) != count:
            raise ValueError(f"{part} has shape {list(found)}, expected {count} values")
    found_bytes = state.checkpoint[state.name].nbytes
    if found_bytes != ceil(prod(state.spec.shape) / 2):
        raise ValueError(f"the codes have {found_bytes} bytes for a weight of shape {list(state.spec.shape)}")
