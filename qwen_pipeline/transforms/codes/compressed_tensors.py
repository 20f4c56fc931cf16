"""The packed codes of compressed-tensors (format ``pack-quantized``), as llm-compressor writes them.

A linear layer is (https://github.com/vllm-project/compressed-tensors, ``pack_quantized``; ``P`` codes fill a word, the
first inputs in the lowest bits) ``weight_packed`` I32 [O, I / P], ``weight_scale`` [O, G], ``weight_zero_point``
I32 [O / P, G] unless it is symmetric, ``weight_g_idx`` [I] with act-order, and ``weight_shape``, whose value is
[O, I]. The tensors are those of ``gptq_v2``, transposed; the zero point of symmetric codes is the middle code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

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

    def load(self, checkpoint: Checkpoint, module: str) -> PackedLinear:
        """Read one layer's codes and repack them in GPTQ's layout."""
        import torch

        def optional(code: str, default: "torch.Tensor") -> "torch.Tensor":
            return checkpoint.load(f"{module}.{code}") if f"{module}.{code}" in checkpoint else default

        qweight = checkpoint.load(f"{module}.weight_packed").T
        scales = checkpoint.load(f"{module}.weight_scale").T
        per_word, middle = WORD_BITS // self.bits, word_of(2 ** (self.bits - 1), self.bits)
        symmetric = torch.full((scales.shape[1] // per_word, len(scales)), middle, dtype=torch.int32)
        return PackedLinear(
            format=GptqFormat(
                bits=self.bits,
                group_size=self.group_size,
                desc_act=self.desc_act,
                sym=self.symmetric,
                checkpoint_format="gptq_v2",
            ),
            qweight=qweight,
            qzeros=optional("weight_zero_point", symmetric).T,
            scales=scales,
            g_idx=optional("weight_g_idx", in_order(len(qweight) * per_word, self.group_size)),
        )


def compressed_format(settings: Mapping[str, Any]) -> CompressedFormat:
    """Return the format in a model's ``quantization_config``.

    Raises:
        CheckpointRefused: The format is not ``pack-quantized``, there is not exactly one scheme, or its weights are not
            integers of 4 or 8 bits in groups.
    """
    groups = cast("Mapping[str, Any]", settings.get("config_groups") or {})
    schemes = [cast("Mapping[str, Any]", scheme.get("weights") or {}) for scheme in groups.values()]
    scheme = schemes[0] if schemes else {}
    found = {
        "format": settings.get("format"),
        "schemes": len(schemes),
        "num_bits": scheme.get("num_bits"),
        "type": scheme.get("type"),
        "strategy": scheme.get("strategy"),
    }
    fits = len(schemes) == 1 and found["format"] == "pack-quantized" and found["num_bits"] in PACKED_BITS
    if not fits or found["type"] != "int" or found["strategy"] != "group":
        raise CheckpointRefused(
            f"The compressed-tensors config has {found}; expected the format 'pack-quantized' and one scheme of 4 or"
            " 8 bit integers (type 'int', strategy 'group').",
            remedy="Use a checkpoint with 4 or 8 bit weights in groups, such as one of llm-compressor's scheme W4A16.",
        )
    return CompressedFormat(
        bits=int(scheme["num_bits"]),
        group_size=int(scheme["group_size"]),
        symmetric=bool(scheme.get("symmetric", True)),
        desc_act=scheme.get("actorder") in (True, "group"),
    )
