"""The packed codes of compressed-tensors (format ``pack-quantized``), as llm-compressor writes them.

A linear layer is (https://github.com/vllm-project/compressed-tensors, ``pack_quantized``; ``P`` codes fill a word, the
first inputs from the lowest bits) ``weight_packed`` I32 [O, I / P], ``weight_scale`` [O, G], ``weight_zero_point``
I32 [O / P, G] unless it is symmetric, ``weight_g_idx`` [I] with act-order, and ``weight_shape`` with [O, I]. All of it
is GPTQ's second format, transposed; a symmetric code is relative to the middle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.gptq import PACKED_BITS, GptqFormat, PackedLinear, in_order
from qwen_pipeline.transforms.codes.parts import (
    QUIET_SCALE,
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
    """What a config says about the codes of compressed-tensors."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool

    @property
    def codes(self) -> tuple[str, ...]:
        zeros = () if self.symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_scale", "weight_shape", *zeros)

    @property
    def parts(self) -> Mapping[str, CodeTensor]:
        """How each tensor of a layer counts channels; new ones have the middle code, which is their zero point too."""
        per_word, middle = WORD_BITS // self.bits, word_of(2 ** (self.bits - 1), self.bits)
        return MappingProxyType(
            {
                "weight_packed": Elements((Axis("out"), Axis("in", per_word)), middle),
                "weight_scale": Elements((Axis("out"), Axis("groups")), QUIET_SCALE),
                "weight_zero_point": Elements((Axis("out", per_word), Axis("groups")), middle),
                "weight_g_idx": GroupNumbers(),
                "weight_shape": StatedShape(),
                **UNPACKED,
            }
        )

    def load(self, checkpoint: Checkpoint, module: str) -> PackedLinear:
        """Read one layer's codes and put them into GPTQ's order."""
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
    """Read the format from a model's ``quantization_config``.

    Raises:
        CheckpointRefused: Another format than ``pack-quantized``, more than one scheme, activations that are quantized,
            or another strategy than groups.
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
            f"The compressed-tensors config has {found}, expected one scheme of 4 or 8 bit integers in groups, format"
            " 'pack-quantized'.",
            remedy="Name a checkpoint with 4 or 8 bit weights in groups, such as llm-compressor's W4A16.",
        )
    return CompressedFormat(
        bits=int(scheme["num_bits"]),
        group_size=int(scheme["group_size"]),
        symmetric=bool(scheme.get("symmetric", True)),
        desc_act=scheme.get("actorder") in (True, "group"),
    )
