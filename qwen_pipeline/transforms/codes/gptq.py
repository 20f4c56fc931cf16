"""GPTQ's packed codes: their layout, and the weights that they encode.

A quantized linear layer of I inputs and O outputs, with G groups of inputs, is four tensors
(https://github.com/ModelCloud/GPTQModel, ``TorchLinear``; ``P`` codes of ``bits`` bits fill one 32-bit word, lowest
bits first):

=========  =====  ==========  ===================================================
qweight    I32    [I / P, O]  word w of column o holds the codes of inputs P w ...
qzeros     I32    [G, O / P]  word w of row g holds the zero points of outputs P w ...
scales     F16    [G, O]
g_idx      I32    [I]         the group of each input
=========  =====  ==========  ===================================================

and the weight is ``W[o, i] = scales[g, o] * (code[i, o] - zero[g, o])`` with ``g = g_idx[i]``. Checkpoints of the older
format ``gptq`` store ``zero - 1``; ``gptq_v2`` stores ``zero``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.parts import (
    ADDED_SCALE,
    UNPACKED,
    WORD_BITS,
    Axis,
    CodeTensor,
    Elements,
    GroupNumbers,
    word_of,
)

if TYPE_CHECKING:
    import torch

CheckpointFormat = Literal["gptq", "gptq_v2"]
PACKED_BITS = (4, 8)
CODES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """The settings of GPTQ codes in a ``quantization_config``. ``group_size`` -1 is one group for all inputs."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: CheckpointFormat

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def stored_zero_offset(self) -> int:
        """The number to add to a stored zero point."""
        return 1 if self.checkpoint_format == "gptq" else 0

    @property
    def codes(self) -> tuple[str, ...]:
        return CODES if self.desc_act else CODES[:3]

    @property
    def code_tensors(self) -> Mapping[str, CodeTensor]:
        """The channels of each tensor of a layer; added ones have the middle code, which is also their zero point."""
        middle, per_word = 2 ** (self.bits - 1), self.codes_per_word
        codes = {
            "qweight": Elements((Axis("in", per_word), Axis("out")), word_of(middle, self.bits)),
            "qzeros": Elements(
                (Axis("groups"), Axis("out", per_word)), word_of(middle - self.stored_zero_offset, self.bits)
            ),
            "scales": Elements((Axis("groups"), Axis("out")), ADDED_SCALE),
            "g_idx": GroupNumbers(),
        }
        return MappingProxyType({**codes, **UNPACKED})

    def load(self, checkpoint: Checkpoint, module: str) -> "PackedLinear":
        """Read one layer's codes. Some quantizers omit ``g_idx`` if inputs are in order."""
        qweight, qzeros, scales = (checkpoint.load(f"{module}.{code}") for code in CODES[:3])
        inputs = len(qweight) * self.codes_per_word
        name = f"{module}.g_idx"
        g_idx = checkpoint.load(name) if name in checkpoint else in_order(inputs, self.inputs_per_group(inputs))
        return PackedLinear(format=self, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)

    def inputs_per_group(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def code_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return dtype and shape of the four tensors of a layer, by the suffixes of their names."""
        groups, per_word = ceil(in_features / self.inputs_per_group(in_features)), self.codes_per_word
        return {
            "qweight": TensorSpec(dtype="I32", shape=(in_features // per_word, out_features)),
            "qzeros": TensorSpec(dtype="I32", shape=(groups, out_features // per_word)),
            "scales": TensorSpec(dtype="F16", shape=(groups, out_features)),
            "g_idx": TensorSpec(dtype="I32", shape=(in_features,)),
        }


def gptq_format(config: Mapping[str, Any]) -> GptqFormat:
    """Return the format in a model's ``config.json``.

    Raises:
        CheckpointRefused: The model is not quantized by GPTQ, or not to 4 or 8 bits, or a setting is not supported.
    """
    settings = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    method, bits = settings.get("quant_method"), settings.get("bits")
    checkpoint_format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    remedy = "Use a checkpoint that was quantized to 4 or 8 bits with GPTQ."
    if method != "gptq":
        raise CheckpointRefused(f"config.json has quant_method {method!r}, expected 'gptq'.", remedy=remedy)
    if bits not in PACKED_BITS:
        raise CheckpointRefused(f"config.json has bits {bits!r}, expected one of {PACKED_BITS}.", remedy=remedy)
    if checkpoint_format not in get_args(CheckpointFormat):
        raise CheckpointRefused(
            f"config.json has checkpoint_format {checkpoint_format!r}, expected one of {get_args(CheckpointFormat)}.",
            remedy=remedy,
        )
    group_size = settings.get("group_size")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointRefused(
            f"config.json has group_size {group_size!r}, expected -1 or a positive integer.", remedy=remedy
        )
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        desc_act=bool(settings.get("desc_act", False)),
        sym=bool(settings.get("sym", True)),
        checkpoint_format=checkpoint_format,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """The four tensors of one layer in memory (about ``bits / 8`` bytes a weight); weights are computed by rows."""

    format: GptqFormat
    qweight: "torch.Tensor"
    qzeros: "torch.Tensor"
    scales: "torch.Tensor"
    g_idx: "torch.Tensor"

    @property
    def is_in_order(self) -> bool:
        """True if groups consist of consecutive inputs, which is always so without act-order."""
        import torch

        inputs = len(self.g_idx)
        groups_I = in_order(inputs, self.format.inputs_per_group(inputs))
        return torch.equal(self.g_idx, groups_I.to(self.g_idx.device))

    def weight_rows(self, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop`` of the weight without rounding, float32 [stop - start, I].

        The product of a float16 scale and a difference of codes below 2**8 is exact in float32.
        """
        codes_IO = unpack_rows(self.qweight[:, start:stop], self.format.bits)
        zeros_GO = self.zeros(start, stop)
        groups_I = self.g_idx.long()
        steps_IO = codes_IO - zeros_GO[groups_I]
        return (steps_IO * self.scales[:, start:stop].float()[groups_I]).T

    def zeros(self, start: int, stop: int) -> "torch.Tensor":
        """Return the zero points of outputs ``start:stop``, int32 [G, stop - start]."""
        per_word = self.format.codes_per_word
        first = start // per_word
        words = self.qzeros[:, first : ceil(stop / per_word)]
        stored = unpack_rows(words.T.contiguous(), self.format.bits).T[:, start - first * per_word :][:, : stop - start]
        return (stored + self.format.stored_zero_offset) & (2**self.format.bits - 1)


def in_order(inputs: int, per_group: int) -> "torch.Tensor":
    """Return the group of each input if groups consist of consecutive inputs: int32 [I]."""
    import torch

    return torch.arange(inputs, dtype=torch.int32) // per_group


def unpack_rows(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Unpack int32 words [R, C] into int32 codes [R * 32 / bits, C]; the first rows are in the lowest bits."""
    import torch

    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    codes = (words[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    return codes.reshape(len(words) * len(shifts), words.shape[1])


def pack_rows(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Pack codes [R * 32 / bits, C] into int32 words [R, C]; the inverse of :func:`unpack_rows`."""
    import torch

    per_word = WORD_BITS // bits
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int64, device=codes.device)
    words = (codes.long().reshape(-1, per_word, codes.shape[1]) << shifts[None, :, None]).sum(dim=1)
    return (words - ((words >> (WORD_BITS - 1)) << WORD_BITS)).int()
