"""The packed codes of compressed-tensors (format ``pack-quantized``), as llm-compressor writes them.

A linear layer is (https://github.com/vllm-project/compressed-tensors, ``pack_quantized``; ``P`` codes fill a word, the
first inputs in the lowest bits) ``weight_packed`` I32 [O, I / P], ``weight_scale`` [O, G], ``weight_zero_point``
I32 [O / P, G] unless it is symmetric, ``weight_g_idx`` [I] with act-order, and ``weight_shape``, whose value is
[O, I]. The tensors are those of ``gptq_v2``, transposed; the zero point of symmetric codes is the middle code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.config_types import is_size
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.gptq import PACKED_BITS, GptqFormat, PackedLinear, in_order
from qwen_pipeline.transforms.codes.parts import (
    ADDED_SCALE,
    UNPACKED,
    WORD_BITS,
    Axis,
    CodeTensor,
    Elements,
    GroupNumbers,
    StatedShape,
    word_of,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedFormat:
    """The settings of compressed-tensors codes in a config."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool

    @property
    def codes(self) -> tuple[str, ...]:
        zeros = () if self.symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_scale", "weight_shape", *zeros)

    @property
    def code_tensors(self) -> Mapping[str, CodeTensor]:
        """The channels of each tensor of a layer; added ones have the middle code, which is also their zero point."""
        per_word, middle = WORD_BITS // self.bits, word_of(2 ** (self.bits - 1), self.bits)
        return MappingProxyType(
            {
                "weight_packed": Elements((Axis("out"), Axis("in", per_word)), middle),
                "weight_scale": Elements((Axis("out"), Axis("groups")), ADDED_SCALE),
                "weight_zero_point": Elements((Axis("out", per_word), Axis("groups")), middle),
                "weight_g_idx": GroupNumbers(),
                "weight_shape": StatedShape(),
                **UNPACKED,
            }
        )

    def of(self, checkpoint: Checkpoint, module: str) -> "CompressedFormat":
        """Return the format of one layer's codes, whose bits and groups follow from the shapes that are stored."""
        packed, scales = (checkpoint.get(f"{module}.{code}") for code in ("weight_packed", "weight_scale"))
        if not (packed and scales and f"{module}.weight_shape" in checkpoint):
            return self
        inputs = int(checkpoint.load(f"{module}.weight_shape")[1])
        per_word, groups = inputs // packed.shape[1], scales.shape[1]
        bits = WORD_BITS // per_word if per_word else 0
        if bits not in PACKED_BITS or (bits, ceil(inputs / self.group_size)) == (self.bits, groups):
            return self
        return replace(self, bits=bits, group_size=ceil(inputs / groups))

    def load(self, checkpoint: Checkpoint, module: str) -> PackedLinear:
        """Read one layer's codes and repack them in GPTQ's layout."""
        import torch

        own = self.of(checkpoint, module)

        def optional(code: str, default: "torch.Tensor") -> "torch.Tensor":
            return checkpoint.load(f"{module}.{code}") if f"{module}.{code}" in checkpoint else default

        qweight = checkpoint.load(f"{module}.weight_packed").T
        scales = checkpoint.load(f"{module}.weight_scale").T
        per_word, middle = WORD_BITS // own.bits, word_of(2 ** (own.bits - 1), own.bits)
        symmetric = torch.full((scales.shape[1] // per_word, len(scales)), middle, dtype=torch.int32)
        return PackedLinear(
            format=GptqFormat(
                bits=own.bits,
                group_size=own.group_size,
                desc_act=self.desc_act,
                sym=self.symmetric,
                checkpoint_format="gptq_v2",
            ),
            qweight=qweight,
            qzeros=optional("weight_zero_point", symmetric).T,
            scales=scales,
            g_idx=optional("weight_g_idx", in_order(len(qweight) * per_word, own.group_size)),
        )


def compressed_format(settings: Mapping[str, Any]) -> CompressedFormat:
    """Return the format in a model's ``quantization_config``.

    Raises:
        CheckpointRefused: The format is not ``pack-quantized``, there is no scheme, or one has weights that are not
            integers of 4 or 8 bits in groups; or schemes differ in symmetry or order.
    """
    groups = _mapping(settings.get("config_groups"))
    schemes = [_mapping(_mapping(scheme).get("weights")) for scheme in groups.values()]
    scheme = schemes[0] if schemes else {}
    unread = next((each for each in schemes if not _is_read(each, like=scheme)), scheme)
    found = {
        "format": settings.get("format"),
        "schemes": len(schemes),
        **{name: unread.get(name) for name in ("num_bits", "type", "strategy", "group_size")},
    }
    if found["format"] != "pack-quantized" or not schemes or not _is_read(unread, like=scheme):
        raise CheckpointRefused(
            f"The compressed-tensors config has {found}; expected the format 'pack-quantized' and schemes of 4 or 8 bit"
            " integers (type 'int', strategy 'group'), alike in symmetry and order.",
            remedy="Use a checkpoint with 4 or 8 bit weights in groups, such as one of llm-compressor's scheme W4A16.",
        )
    return CompressedFormat(
        bits=int(scheme["num_bits"]),
        group_size=scheme["group_size"],
        symmetric=bool(scheme.get("symmetric", True)),
        desc_act=scheme.get("actorder") in (True, "group"),
    )


def _is_read(scheme: Mapping[str, Any], *, like: Mapping[str, Any]) -> bool:
    """Return whether a scheme has codes that are read here, in the same way as those of another scheme."""
    alike = all(scheme.get(name) == like.get(name) for name in ("symmetric", "actorder"))
    is_packed = scheme.get("num_bits") in PACKED_BITS and scheme.get("type") == "int"
    has_groups = is_size(scheme.get("group_size")) and scheme.get("strategy") == "group"
    return alike and is_packed and has_groups


def _mapping(value: object) -> Mapping[str, Any]:
    """Return a value of a config that should be an object; an empty one if it is not."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}
