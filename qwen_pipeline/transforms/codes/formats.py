"""The formats of packed codes that this package reads, behind one face."""

from collections.abc import Mapping
from typing import Any, Protocol

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.awq import awq_format
from qwen_pipeline.transforms.codes.compressed_tensors import compressed_format
from qwen_pipeline.transforms.codes.gptq import PackedLinear, gptq_format
from qwen_pipeline.transforms.codes.parts import CodeTensor


class CodeFormat(Protocol):
    """How the linear layers of one checkpoint are packed.

    Attributes:
        desc_act: Whether inputs were quantized in another order than they are stored in (act-order).
        codes: Endings of the tensors that every packed layer has.
        parts: Ending of a tensor -> how it counts channels; packed layers and layers that stayed as they were.
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
    def parts(self) -> Mapping[str, CodeTensor]: ...
    def load(self, checkpoint: Checkpoint, module: str, /) -> PackedLinear:
        """Read one layer into the one form that weights are computed from."""
        ...


def code_format(settings: Mapping[str, Any]) -> CodeFormat:
    """Return the format that a model's ``quantization_config`` describes.

    Raises:
        CheckpointRefused: There is none, or it is not one of the formats that can be read.
    """
    method = settings.get("quant_method")
    if method == "gptq":
        return gptq_format({"quantization_config": settings})
    if method == "awq":
        return awq_format(settings)
    if method == "compressed-tensors":
        return compressed_format(settings)
    raise CheckpointRefused(
        f"The checkpoint is quantized by {method!r}; gptq, awq and compressed-tensors can be read."
        if settings
        else "The checkpoint is not quantized: neither config.json nor quantize_config.json has quantization settings.",
        remedy="Name a checkpoint of packed codes; full precision is padded with: qwen-pipeline pad",
    )
