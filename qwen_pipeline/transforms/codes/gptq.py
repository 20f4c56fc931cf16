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

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
EXCLUDE, OVERRIDE = "-:", "+:"
"""Prefixes of a key of ``dynamic``: that of modules without codes, and that of modules with other codes."""
_BLOCK_WEIGHTS, _COUNTED_WORDS = {"cpu": 2**20, "cuda": 2**24}, {"cpu": 2**16, "cuda": 2**26}
"""Weights of a block of rows, and words whose codes are counted at a time; on a CPU they stay in its caches."""


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

    def of(self, checkpoint: Checkpoint, module: str) -> "GptqFormat":
        """Return the format of one layer's codes, whose bits and groups follow from the shapes that are stored.

        A word of ``qzeros`` holds as many outputs as one of ``qweight`` holds inputs. Shapes that are possible with
        this format, and shapes that belong to none, have this one.
        """
        qweight, qzeros, scales = (checkpoint.get(f"{module}.{code}") for code in CODES[:3])
        shapes = [each.shape for each in (qweight, qzeros, scales) if each and len(each.shape) == 2]
        if len(shapes) < 3 or not all(map(min, shapes)):
            return self
        (words, _), (_, zero_words), (groups, outputs) = shapes
        per_word = outputs // zero_words
        bits = WORD_BITS // per_word if per_word else 0
        inputs = words * per_word
        if bits not in PACKED_BITS or outputs % zero_words:
            return self
        own = replace(self, bits=bits)
        if ceil(inputs / own.inputs_per_group(inputs)) == groups:
            return own
        return replace(own, group_size=inputs // groups) if inputs % groups == 0 else self

    def load(self, checkpoint: Checkpoint, module: str) -> "PackedLinear":
        """Read one layer's codes. Some quantizers omit ``g_idx`` if inputs are in order."""
        form = self.of(checkpoint, module)
        qweight, qzeros, scales = (checkpoint.load(f"{module}.{code}") for code in CODES[:3])
        inputs = len(qweight) * form.codes_per_word
        name = f"{module}.g_idx"
        g_idx = checkpoint.load(name) if name in checkpoint else in_order(inputs, form.inputs_per_group(inputs))
        return PackedLinear(format=form, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)

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
        CheckpointRefused: The model is not quantized by GPTQ, or not to 4 or 8 bits, or a setting or a rule for single
            modules is not supported.
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
    _require_rules(settings.get("dynamic") or {})
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        desc_act=bool(settings.get("desc_act", False)),
        sym=bool(settings.get("sym", True)),
        checkpoint_format=checkpoint_format,
    )


def expression_of(rule: str) -> str:
    """Return the regular expression of a key of ``dynamic``."""
    return rule[2:] if rule.startswith((EXCLUDE, OVERRIDE)) else rule


def _require_rules(dynamic: Any) -> None:
    rules = cast("Mapping[str, Any]", dynamic if isinstance(dynamic, Mapping) else {str(dynamic): None})
    for rule, fields in rules.items():
        try:
            re.compile(expression_of(rule))
        except re.error as error:
            fault = str(error)
        else:
            known = isinstance(fields, Mapping) and fields.get("bits", 4) in PACKED_BITS
            fault = "" if known and isinstance(fields.get("group_size", 1), int) else f"its value is {fields!r}"
        if fault:
            raise CheckpointRefused(
                f"config.json has a rule for single modules in dynamic, {rule!r}, that is not supported: {fault}.",
                remedy="Correct the rule: an expression of Python's re, with 4 or 8 bits and an integer group_size.",
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
        return self._rows(start, stop, in_order=self.is_in_order)

    def write_weight(self, out_OI: "torch.Tensor") -> None:
        """Fill a tensor with the weight, rounded to its dtype; memory holds one block of rows besides."""
        in_order, rows = self.is_in_order, max(1, _BLOCK_WEIGHTS[out_OI.device.type] // max(1, out_OI.shape[1]))
        for start in range(0, len(out_OI), rows):
            out_OI[start : start + rows] = self._rows(start, min(start + rows, len(out_OI)), in_order=in_order)

    def _rows(self, start: int, stop: int, *, in_order: bool) -> "torch.Tensor":
        codes_OI = unpack_columns(self.qweight[:, start:stop].T.contiguous(), self.format.bits)
        zeros_OG, scales_OG = self.zeros(start, stop).T.contiguous(), self.scales[:, start:stop].T.float()
        groups, inputs = zeros_OG.shape[1], len(self.g_idx)
        if in_order and inputs % groups == 0:
            steps_OGS = codes_OI.view(len(codes_OI), groups, inputs // groups) - zeros_OG[:, :, None]
            return (steps_OGS * scales_OG[:, :, None]).flatten(1)
        groups_I = self.g_idx.long()
        return (codes_OI - zeros_OG[:, groups_I]) * scales_OG[:, groups_I]

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


def unpack_columns(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Unpack int32 words [R, C] into int32 codes [R, C * 32 / bits]; the first columns are in the lowest bits."""
    import torch

    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def count_extremes(words: "torch.Tensor", bits: int) -> int:
    """Return the number of codes in int32 words, of any shape, that are at either end of their range."""
    import torch

    lowest = word_of(1, bits)

    def all_ones(words: "torch.Tensor") -> "torch.Tensor":
        shift = 1
        while shift < bits:
            words, shift = words & (words >> shift), 2 * shift
        return words & lowest  # of each code, whether all of its bits were ones

    def count(words: "torch.Tensor") -> "torch.Tensor":
        found = all_ones(words) | all_ones(~words)
        highest = (found * lowest) >> (WORD_BITS - bits)  # adds up all codes of a word
        return (highest & (2**bits - 1)).sum()

    return int(torch.stack([count(part) for part in words.flatten().split(_COUNTED_WORDS[words.device.type])]).sum())


def pack_rows(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Pack codes [R * 32 / bits, C] into int32 words [R, C]; the inverse of :func:`unpack_rows`."""
    import torch

    per_word = WORD_BITS // bits
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int64, device=codes.device)
    words = (codes.long().reshape(-1, per_word, codes.shape[1]) << shifts[None, :, None]).sum(dim=1)
    return (words - ((words >> (WORD_BITS - 1)) << WORD_BITS)).int()
