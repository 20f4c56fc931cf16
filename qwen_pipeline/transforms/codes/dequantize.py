"""A quantized model as the full precision that its codes stand for, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.families import text_config
from qwen_pipeline.transforms.codes.bitsandbytes import parts_of, restored, stored_in_4_bits
from qwen_pipeline.transforms.codes.formats import CodeFormat, code_format
from qwen_pipeline.transforms.codes.gptq import PackedLinear
from qwen_pipeline.transforms.codes.parts import CodeTensor, Elements
from qwen_pipeline.transforms.codes.scaled_floats import FLOATS, OF_ACTIVATIONS, scale_of, scaled

if TYPE_CHECKING:
    import torch

_SETTINGS = ("quantization_config", "compression_config")
_FULL: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FIRST_CODES = ("qweight", "weight_packed")
"""The tensor of a packed layer in whose place its weight comes."""


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a quantized checkpoint in full precision; one that is not quantized is returned unchanged.

    Weights get the dtype that the config states (bfloat16 if it states none) and are rounded to it once. Codes of GPTQ,
    AWQ, compressed-tensors and bitsandbytes (4 bits) and 8-bit floats are read. Scales of activations are left out;
    everything else stays.

    Raises:
        CheckpointRefused: The codes have another format, or a code or a scale is missing.
    """
    settings = _settings(checkpoint.config)
    if not settings and not any(spec.dtype in FLOATS for spec in checkpoint.values()):
        return checkpoint
    dtype = _dtype(checkpoint.config)
    floats = [name for name, spec in checkpoint.items() if spec.dtype in FLOATS]
    packed = [name for name in checkpoint if name.rpartition(".")[2] in _FIRST_CODES]
    replaced = {name: (name, scaled(checkpoint, name, dtype, settings)) for name in floats}
    replaced |= dict(_unpacked(checkpoint, packed, dtype, settings)) if packed else {}
    in_4_bits = stored_in_4_bits(checkpoint)
    replaced |= {name: (name, restored(checkpoint, name)) for name in in_4_bits}
    consumed = {scale_of(checkpoint, name) for name in floats}
    consumed |= {part for name in in_4_bits for part in parts_of(checkpoint, name)}
    consumed |= {name for name in checkpoint if name.rpartition(".")[2] in OF_ACTIVATIONS}
    if packed:
        consumed |= _codes(checkpoint, packed, code_format(settings)) - set(packed)
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in consumed:
            new_name, tensors[new_name] = replaced.get(name, (name, tensor))
            shards[new_name] = checkpoint.shards[name]
    _require_full(tensors, settings)
    config = without_quantization(checkpoint.config)
    return replace(checkpoint, tensors=tensors, shards=shards, config=config, config_bytes=None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the settings of a quantization, at its top or in the language model's section."""
    kept = {field: value for field, value in config.items() if field not in _SETTINGS}
    return {
        field: without_quantization(cast("Mapping[str, Any]", value)) if field.endswith("_config") else value
        for field, value in kept.items()
    }


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    sections = (config, text_config(config))
    found = (section.get(field) for section in sections for field in _SETTINGS)
    return cast("Mapping[str, Any]", next((each for each in found if isinstance(each, Mapping)), {}))


def _dtype(config: Mapping[str, Any]) -> str:
    sections = (config, text_config(config))
    stated = (section.get(field) for section in sections for field in ("dtype", "torch_dtype"))
    return _FULL.get(str(next((each for each in stated if each), "bfloat16")), "BF16")


def _codes(checkpoint: Checkpoint, packed: list[str], form: CodeFormat) -> set[str]:
    """Return the names of all code tensors of packed layers."""
    suffixes = {*form.code_tensors, *form.codes} - {"weight", "bias"}
    modules = [name.rpartition(".")[0] for name in packed]
    return {name for module in modules for code in suffixes if (name := f"{module}.{code}") in checkpoint}


def _unpacked(
    checkpoint: Checkpoint, packed: list[str], dtype: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, LazyTensor]]]:
    """Yield the first code of each packed layer, and name and tensor of the layer's weight."""
    form = code_format(settings)
    codes = _LastCodes(checkpoint, form)
    for name in packed:
        module = name.rpartition(".")[0]
        if missing := [code for code in form.codes if f"{module}.{code}" not in checkpoint]:
            raise CheckpointRefused(
                f"{module} has codes, but no {', '.join(missing)}.",
                remedy="Fetch the checkpoint again: it is incomplete, or its quantization_config is another's.",
            )
        yield name, (f"{module}.weight", _weight(codes, form, name, dtype))


def _weight(codes: "_LastCodes", form: CodeFormat, code: str, dtype: str) -> LazyTensor:
    """Return the weight of the layer that a code tensor belongs to."""
    module = code.rpartition(".")[0]
    own = form.of(codes.checkpoint, module)
    spec = TensorSpec(dtype=dtype, shape=_shape(codes.checkpoint[code], own.code_tensors[code.rpartition(".")[2]]))

    def read(start: int, stop: int) -> "torch.Tensor":
        return codes.of(module).weight_rows(start, stop).to(spec.torch_dtype).contiguous()

    return LazyTensor(spec=spec, read=read)


def _shape(codes: TensorSpec, layout: CodeTensor) -> tuple[int, int]:
    """Return the shape [O, I] of a weight, from that of its codes."""
    assert isinstance(layout, Elements), f"{layout} has no axes"
    sizes = {axis.counts: length * axis.per for length, axis in zip(codes.shape, layout.axes, strict=True)}
    return sizes["out"], sizes["in"]


class _LastCodes:
    """The codes of the last layers that were read: a layer is read in many blocks, by a few threads."""

    KEPT = 2

    def __init__(self, checkpoint: Checkpoint, form: CodeFormat) -> None:
        self.checkpoint = checkpoint
        self._form = form
        self._kept: dict[str, PackedLinear] = {}
        self._lock = Lock()

    def of(self, module: str) -> PackedLinear:
        with self._lock:
            if module not in self._kept:
                self._kept[module] = self._form.load(self.checkpoint, module)
            if len(self._kept) > self.KEPT:
                del self._kept[next(iter(self._kept))]
            return self._kept[module]


def _require_full(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> None:
    left = [
        f"{name}, {tensor.spec.dtype}"
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.spec.dtype not in ("BF16", "F16", "F32", "F64")
    ]
    left += [name for name in tensors if name.endswith((".absmax", ".quant_map", "_scale", "_scale_inv"))]
    if left:
        raise CheckpointRefused(
            f"The model has weights in a format that is not read ({settings.get('quant_method')}): {listed(left)}.",
            remedy="Use the full-precision model that it was made from.",
        )
