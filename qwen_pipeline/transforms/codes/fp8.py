"""Weights of 8-bit floats that engines compute with: the settings in a config, and a layer's weight by rows.

A linear layer is ``weight`` F8_E4M3 [O, I] and its scales in float32, ``weight_scale_inv`` [O / 128, I / 128] in the
layout of Transformers and Qwen (``quant_method`` ``fp8``), ``weight_scale`` in that of compressed-tensors (format
``float-quantized``), [O / 128, I / 128] or [O, 1]. The weight is ``W[o, i] = w[o, i] * scale[o // rows, i // columns]``
(:mod:`qwen_pipeline.transforms.codes.scaled_floats`). Inputs have no scale in the file: an engine computes one for each
token, or for each block of a token's inputs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.methods import FP8_LAYOUTS, Container, Fp8Layout, Method, method_of

if TYPE_CHECKING:
    import torch

CODE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
LARGEST = 448.0
"""The largest finite value of E4M3."""
_EXCLUSIONS: Mapping[Container, str] = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}
_REMEDY = (
    "Use a checkpoint of one of these layouts. If it was made elsewhere, read it as full precision (qwen-pipeline pad"
    " --base-dequantize) and quantize that."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Format:
    """The settings of a checkpoint of 8-bit floats."""

    layout: Fp8Layout

    @property
    def bits(self) -> int:
        return 8

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 for all of them."""
        return self.layout.block or -1

    @property
    def method(self) -> Method:
        return method_of(self.layout)

    @property
    def suffixes(self) -> tuple[str, str]:
        """The names of a layer's tensors: the codes and their scales."""
        return "weight", self.layout.scale

    @property
    def exclusions(self) -> str:
        """The setting that names the layers in full precision."""
        return _EXCLUSIONS[self.layout.container]

    def code_specs(self, out_features: int, in_features: int, *, scales: str = "F32") -> dict[str, TensorSpec]:
        """Return dtype and shape of the tensors of a layer, by the suffixes of their names.

        Args:
            out_features: Outputs.
            in_features: Inputs.
            scales: The dtype of the scales, one of :data:`SCALE_DTYPES`; only other tools store 16 bits.
        """
        block = self.layout.block
        grid = (ceil(out_features / block), ceil(in_features / block)) if block else (out_features, 1)
        return {
            "weight": TensorSpec(dtype=CODE, shape=(out_features, in_features)),
            self.layout.scale: TensorSpec(dtype=scales, shape=grid),
        }

    def load(self, checkpoint: Checkpoint, module: str) -> "Fp8Linear":
        """Return a layer, whose scales are read now and whose codes are read by rows."""
        codes, scales = checkpoint.tensors[f"{module}.weight"], checkpoint.load(f"{module}.{self.layout.scale}")
        return Fp8Linear(format=self, codes=codes, scales=scales)

    def spread(self, scales: "torch.Tensor", start: int, stop: int, inputs: int) -> "torch.Tensor":
        """Return the scale of each weight of outputs ``start:stop``: [O, 1], or [O, I] if there are blocks."""
        import torch

        if not (block := self.layout.block):
            return scales[start:stop]
        rows = scales[torch.arange(start, stop, device=scales.device) // block]
        return rows.repeat_interleave(block, dim=1)[:, :inputs]

    def weight_rows(self, codes_OI: "torch.Tensor", scales: "torch.Tensor", start: int) -> "torch.Tensor":
        """Return the weight, float32, of codes whose first output is ``start``; ``scales`` are those of the layer."""
        outputs, inputs = codes_OI.shape
        return codes_OI.float() * self.spread(scales, start, start + outputs, inputs)

    def excluded(self, settings: Mapping[str, Any], module: str) -> str | None:
        """Return the entry of the settings that excludes a module as Transformers and vLLM look it up, or None."""
        entries = cast("Sequence[str]", settings.get(self.exclusions) or ())
        return next((entry for entry in entries if _covers(entry, module)), None)

    def settings(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of a checkpoint whose other linear layers are ``excluded``."""
        block = self.layout.block
        if self.layout.container == "fp8":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [block, block],
                "modules_to_not_convert": list(excluded),
            }
        floats = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**floats, "strategy": "block", "block_structure": [block, block]} if block else floats
        inputs = {**floats, "strategy": "group", "group_size": block} if block else {**floats, "strategy": "token"}
        scheme = {
            "targets": ["Linear"],
            "weights": {"strategy": "channel", **weights, "dynamic": False},
            "input_activations": {**inputs, "dynamic": True},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(excluded),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fp8Linear:
    """A layer of 8-bit floats.

    Attributes:
        codes: The 8-bit floats [O, I].
        scales: [O, 1] or [O / block, I / block], float32.
    """

    format: Fp8Format
    codes: LazyTensor
    scales: "torch.Tensor"

    def weight_rows(self, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop`` of the weight without rounding, float32 [stop - start, I]."""
        return self.format.weight_rows(self.codes.read(start, stop), self.scales, start)

    def scale_rows(self, start: int, stop: int) -> "torch.Tensor":
        """Return the scale of each weight in rows ``start:stop``, float32 [stop - start, I] or [stop - start, 1]."""
        return self.format.spread(self.scales, start, stop, self.codes.spec.shape[1])


def is_fp8(settings: Mapping[str, Any]) -> bool:
    """Return whether a ``quantization_config`` describes 8-bit floats, supported ones or not."""
    method = settings.get("quant_method")
    return method == "fp8" or (method == "compressed-tensors" and settings.get("format") == "float-quantized")


def fp8_format(settings: Mapping[str, Any]) -> Fp8Format:
    """Return the format in a model's ``quantization_config``.

    Raises:
        CheckpointRefused: It is not one of :data:`FP8_LAYOUTS`; the message has what was found.
    """
    found = _found(settings)
    for layout in FP8_LAYOUTS.values():
        form = Fp8Format(layout=layout)
        if found == _found(form.settings(())):
            return form
    raise CheckpointRefused(
        f"The quantization_config has {found}; expected 8-bit floats with dynamic scales of the inputs, as quant_method"
        " 'fp8' in blocks of 128 x 128, or as compressed-tensors in such blocks or with one scale for each output.",
        remedy=_REMEDY,
    )


def _found(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide how an engine computes; defaults that tools leave out are filled in."""
    if settings.get("quant_method") == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": settings.get("fmt", "e4m3"),
            "activation_scheme": settings.get("activation_scheme", "dynamic"),
            "weight_block_size": list(settings.get("weight_block_size") or ()),
        }
    groups = cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {})
    schemes = [{part: _part(group.get(part)) for part in ("weights", "input_activations")} for group in groups.values()]
    return {"quant_method": settings.get("quant_method"), "format": settings.get("format"), "schemes": schemes}


def _part(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("num_bits", "type", "symmetric", "strategy", "dynamic", "block_structure", "group_size")
    return {name: value for name in names if (value := (settings or {}).get(name)) is not None}


def _covers(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
