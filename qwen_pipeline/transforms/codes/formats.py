"""The formats of packed codes that this package reads, behind one protocol."""

from collections.abc import Mapping
from typing import Any, Protocol

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.awq import awq_format
from qwen_pipeline.transforms.codes.compressed_tensors import compressed_format
from qwen_pipeline.transforms.codes.gptq import PackedLinear, gptq_format
from qwen_pipeline.transforms.codes.parts import CodeTensor


class CodeFormat(Protocol):
    """The format of the packed linear layers of one checkpoint.

    Attributes:
        bits: Bits of a code.
        group_size: Inputs of a group; -1 is one group for all inputs.
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
    def load(self, checkpoint: Checkpoint, module: str, /) -> PackedLinear:
        """Read one layer, whose weight can then be computed by rows."""
        ...


def code_format(settings: Mapping[str, Any]) -> CodeFormat:
    """Return the format that a model's ``quantization_config`` describes.

    Raises:
        CheckpointRefused: The checkpoint is not quantized, or the format is not supported.
    """
    method = settings.get("quant_method")
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
