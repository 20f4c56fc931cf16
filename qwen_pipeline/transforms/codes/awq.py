"""AWQ's packed codes, in the layout of its ``gemm`` kernels.

A linear layer is three tensors (https://github.com/casper-hansen/AutoAWQ, ``WQLinear_GEMM``): ``qweight``
I32 [I, O / 8], ``qzeros`` I32 [G, O / 8] and ``scales`` [G, O]. Eight outputs share a word, in the order in which the
kernel unpacks them (:data:`ORDER`), and ``W[o, i] = scales[g, o] * (code[i, o] - zero[g, o])`` with
``g = i // group_size``: inputs are in order, and zero points are stored without an offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.config_types import is_size
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.gptq import GptqFormat, PackedLinear, in_order, pack_rows, unpack_rows
from qwen_pipeline.transforms.codes.parts import ADDED_SCALE, UNPACKED, Axis, CodeTensor, Elements, word_of

if TYPE_CHECKING:
    import torch

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of a word's eight, whose code is at each position, lowest bits first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqFormat:
    """The settings of AWQ codes in a config."""

    group_size: int
    zero_point: bool
    bits: int = BITS
    desc_act: bool = False

    @property
    def codes(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    @property
    def code_tensors(self) -> Mapping[str, CodeTensor]:
        """The channels of each tensor of a layer; added ones have the middle code, which is also their zero point."""
        outputs, middle = Axis("out", len(ORDER)), word_of(2 ** (BITS - 1), BITS)
        return MappingProxyType(
            {
                "qweight": Elements((Axis("in"), outputs), middle),
                "qzeros": Elements((Axis("groups"), outputs), middle),
                "scales": Elements((Axis("groups"), Axis("out")), ADDED_SCALE),
                **UNPACKED,
            }
        )

    def of(self, checkpoint: Checkpoint, module: str) -> "AwqFormat":  # noqa: ARG002
        """Return this format: AWQ has one for all layers."""
        return self

    def load(self, checkpoint: Checkpoint, module: str) -> PackedLinear:
        """Read one layer's codes and repack them in GPTQ's layout."""
        qweight, qzeros, scales = (checkpoint.load(f"{module}.{code}") for code in self.codes)
        codes_IO, zeros_GO = _unpacked(qweight), _unpacked(qzeros)
        return PackedLinear(
            format=GptqFormat(
                bits=BITS,
                group_size=self.group_size,
                desc_act=False,
                sym=not self.zero_point,
                checkpoint_format="gptq_v2",
            ),
            qweight=pack_rows(codes_IO, BITS),
            qzeros=pack_rows(zeros_GO.T, BITS).T,
            scales=scales,
            g_idx=in_order(len(codes_IO), self.group_size),
        )


def awq_format(settings: Mapping[str, Any]) -> AwqFormat:
    """Return the format in a model's ``quantization_config``, in AutoAWQ's spelling or GPTQModel's.

    Raises:
        CheckpointRefused: The layout is not ``gemm``, the codes do not have 4 bits, or the group size is missing.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    group_size = settings.get("group_size", settings.get("q_group_size"))
    layout = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != BITS or layout != "gemm" or not is_size(group_size):
        raise CheckpointRefused(
            f"The AWQ codes have bits {bits!r}, group_size {group_size!r} and layout {layout!r}; expected {BITS}, a"
            " positive integer and 'gemm'.",
            remedy="Convert the checkpoint to AWQ's gemm layout with the tool that made it.",
        )
    return AwqFormat(group_size=group_size, zero_point=bool(settings.get("zero_point", True)))


def _unpacked(words: "torch.Tensor") -> "torch.Tensor":
    """Unpack words [R, C] into codes [R, 8 C]."""
    import torch

    codes = unpack_rows(words.T.contiguous(), BITS).reshape(words.shape[1], len(ORDER), -1)
    return codes[:, torch.tensor(ORDER).argsort()].reshape(-1, len(words)).T
