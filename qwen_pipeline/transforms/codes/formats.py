"""The formats of packed codes that this package reads, behind one protocol."""

from collections.abc import Mapping
from typing import Any, Protocol

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.awq import awq_format
from qwen_pipeline.transforms.codes.compressed_tensors import compressed_format
from qwen_pipeline.transforms.codes.fp8 import is_fp8
from qwen_pipeline.transforms.codes.gptq import GptqFormat, PackedLinear, gptq_format
from qwen_pipeline.transforms.codes.module_rules import declared_format
from qwen_pipeline.transforms.codes.parts import CodeTensor


class CodeFormat(Protocol):
    """The format of the packed linear layers of one checkpoint.

    Attributes:
        bits: Bits of a code, unless a layer has others.
        group_size: Inputs of a group, unless a layer has others; -1 is one group for all inputs.
        desc_act: Whether inputs were quantized in another order than they are stored in (act-order).
        codes: Suffixes of the tensors that every packed layer has.
        code_tensors: Suffix of a tensor -> its channels, for packed layers and for layers that were not quantized.
    """

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def desc_act(self) -> bool: ...
    @property
    def codes(self) -> tuple[str, ...]: ...
    @property
    def code_tensors(self) -> Mapping[str, CodeTensor]: ...
    def of(self, checkpoint: Checkpoint, module: str, /) -> "CodeFormat":
        """Return the format of one layer's codes as stored: its bits and groups may be other than these."""
        ...

    def load(self, checkpoint: Checkpoint, module: str, /) -> PackedLinear:
        """Read one layer, whose weight can then be computed by rows."""
        ...


def declared_for(checkpoint: Checkpoint, form: CodeFormat, module: str) -> CodeFormat:
    """Return the format that a config declares for a layer's codes; that of its shapes, if only these tell."""
    if isinstance(form, GptqFormat):
        return declared_format(checkpoint.config.get("quantization_config") or {}, module, form) or form
    return form.of(checkpoint, module)


def code_format(settings: Mapping[str, Any]) -> CodeFormat:
    """Return the format that a model's ``quantization_config`` describes.

    Raises:
        CheckpointRefused: The checkpoint is not quantized, or the format is not supported.
    """
    method = settings.get("quant_method")
    if is_fp8(settings):
        raise CheckpointRefused(
            f"The checkpoint has 8-bit floats (quant_method {method!r}, format {settings.get('format')!r}), not integer"
            " codes in groups.",
            remedy="Read it as full precision and quantize that again: qwen-pipeline pad --base-dequantize, then"
            " qwen-pipeline quantize --method fp8.",
        )
    if method == "gptq":
        return gptq_format({"quantization_config": settings})
    if method == "awq":
        return awq_format(settings)
    if method == "compressed-tensors":
        return compressed_format(settings)
    raise CheckpointRefused(
        f"The checkpoint has quant_method {method!r}, expected 'gptq', 'awq' or 'compressed-tensors'."
        if settings
        else "The checkpoint is not quantized: neither config.json nor quantize_config.json has quantization settings.",
        remedy="Use a checkpoint of packed codes; to pad one in full precision, run: qwen-pipeline pad",
    )
