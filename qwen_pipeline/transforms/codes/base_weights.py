"""The weights that a base stands for: those that are stored, those that its codes encode, or those that QLoRA sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.text_only import language_model
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.nf4 import Statistics, rounded_to_nf4


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights:
    """The way to read a base.

    Attributes:
        dequantize: Whether codes and 8-bit floats are read as the full precision that they stand for.
        nf4: Whether linear layers are rounded as QLoRA rounds them, with magnitudes in float32 (``single``) or in
            8 bits (``double``, ``bnb_4bit_use_double_quant``).
        text_only: Whether of a merge into a composite model only the language model is kept.
    """

    dequantize: bool = False
    nf4: Statistics | None = None
    text_only: bool = False

    def of(self, base: Checkpoint) -> Checkpoint:
        """Return the base with these weights, lazily.

        Raises:
            CheckpointRefused: The codes have a format that is not read.
            InputRefused: It is not known which layers of this family QLoRA rounds.
        """
        read = dequantized(base) if self.dequantize else base
        return rounded_to_nf4(read, self.nf4) if self.nf4 else read

    def kept(self, merged: Checkpoint) -> Checkpoint:
        """Return the part of a merge into the base that is kept: all of it, or its language model.

        Raises:
            InputRefused: The language model of this family has no class of its own.
        """
        return language_model(merged) if self.text_only else merged

    def spec(self, base: Checkpoint) -> dict[str, Any]:
        """Return the settings that change the weights of this base, for a derivation."""
        changed = {"base_dequantize": True} if self.dequantize and dequantized(base) is not base else {}
        chosen = {"base_nf4": self.nf4, "text_only": self.text_only}
        return changed | {name: value for name, value in chosen.items() if value}


AS_STORED = BaseWeights()


def base_weights(spec: Mapping[str, Any]) -> BaseWeights:
    """Return the way to read a base that :meth:`BaseWeights.spec` describes."""
    return BaseWeights(
        dequantize=bool(spec.get("base_dequantize")),
        nf4=spec.get("base_nf4"),
        text_only=bool(spec.get("text_only")),
    )
