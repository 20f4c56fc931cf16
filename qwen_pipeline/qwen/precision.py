"""Precision of single modules: the bits and the group size of a linear layer's codes, or its weight as it is.

Settings name precisions by words, such as ``keep``, ``8`` and ``4g32``; a format of other numbers is another word.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.patterns import compile_pattern

KEEP = "keep"
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
FULL_BITS = 16
_WORD = re.compile(r"([0-9]{1,4})(?:g([0-9]{1,9}))?")

Preset = Literal["uniform", "official"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The way in which one linear layer is stored.

    Attributes:
        bits: Bits of a code; None for a weight that stays in full precision.
        group_size: Consecutive inputs that share one scale; None for a weight.
    """

    bits: int | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits}g{self.group_size}" if self.bits else KEEP

    @property
    def coded(self) -> bool:
        """Return whether the layer has codes."""
        return self.bits is not None

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a layer: codes, zero points and float16 scales, or the weight in 16 bits."""
        numbers = out_features * in_features
        if not self.bits or not self.group_size:
            return numbers * FULL_BITS // 8
        groups = -(-in_features // self.group_size) * out_features
        return (numbers * self.bits + groups * (FULL_BITS + self.bits)) // 8


KEPT = Precision()
PrecisionAt = Callable[[int, str], Precision]
"""Returns the precision of a linear layer by the number of its decoder layer and its path there."""


def uniform(precision: Precision) -> PrecisionAt:
    """Return one precision for all layers."""
    return lambda _, __: precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRules:
    """The precision of every module: that of the first pattern that is found in its name, or the default.

    Attributes:
        default: Precision of a module that no pattern names.
        words: Pattern -> word of a precision; a word without group size has the default's.
    """

    default: Precision
    words: Mapping[str, str]

    def of(self, module: str) -> Precision:
        """Return the precision of a module, by its whole name."""
        word = next((word for pattern, word in self.words.items() if compile_pattern(pattern).search(module)), None)
        return self.default if word is None else self.read(word)

    def at(self, prefix: str) -> PrecisionAt:
        """Return the precisions of a decoder whose modules' names begin with a prefix, such as ``model.``."""
        return lambda layer, kind: self.of(f"{prefix}layers.{layer}.{kind}")

    def read(self, word: str) -> Precision:
        """Return the precision that a word stands for.

        Raises:
            InputRefused: The word is unknown.
        """
        if word == KEEP:
            return KEPT
        match = _WORD.fullmatch(word)
        if match and int(match[1]) in BITS and (not match[2] or int(match[2]) in GROUP_SIZES):
            return Precision(bits=int(match[1]), group_size=int(match[2]) if match[2] else self.default.group_size)
        raise InputRefused(
            f"modules has the precision {word!r}, expected {KEEP}, bits ({_listed(BITS)}), or bits and a group size"
            f" such as 4g32 ({_listed(GROUP_SIZES)}).",
            remedy="Write it as in '[quantization.modules]' \"mlp\\\\.down_proj\" = 8, or --module 'down_proj=keep'.",
        )

    def require_valid(self) -> None:
        """Require that every pattern is a regular expression and that every word is known.

        Raises:
            InputRefused: One is not; the message names it.
        """
        for pattern, word in self.words.items():
            self.read(word)
            try:
                compile_pattern(pattern)
            except ValueError as error:
                raise InputRefused(f"modules: {error}.", remedy="Correct the expression.") from error


def parse_words(texts: Iterable[str]) -> dict[str, str]:
    """Parse ``REGEX=PRECISION`` into the words of :class:`ModuleRules`.

    Raises:
        InputRefused: A text has no ``=``.
    """
    words: dict[str, str] = {}
    for text in texts:
        pattern, equals, word = text.rpartition("=")
        if not equals or not pattern:
            raise InputRefused(
                f"{text!r} is not of the form REGEX=PRECISION.",
                remedy=r"Write it as in --module 'self_attn\.=8' or --module 'mlp\.down_proj=keep'.",
            )
        words[pattern] = word.strip()
    return words


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Release:
    """A release whose precisions a preset repeats."""

    words: Mapping[str, str]
    source: str


_QWEN_3_5 = _Release(
    words={r"_attn\.": KEEP}, source="-:.*attn.* in quantization_config.dynamic of Qwen/Qwen3.5-*-GPTQ-Int4"
)
_QWEN_3_5_MOE = _Release(
    words={r"_attn\.": KEEP, r"\.shared_expert\.": KEEP},
    source="-:.*attn.* and -:.*shared_expert.* in quantization_config.dynamic of Qwen/Qwen3.5-*-GPTQ-Int4",
)
_OFFICIAL: Mapping[str, _Release] = {
    "qwen3_5": _QWEN_3_5,
    "qwen3_5_text": _QWEN_3_5,
    "qwen3_5_moe": _QWEN_3_5_MOE,
    "qwen3_5_moe_text": _QWEN_3_5_MOE,
}
"""Model type -> what Qwen itself leaves out of its GPTQ releases, besides heads, routers, towers and draft heads.

Families that are absent are released with codes for every linear layer of the decoder: Qwen/Qwen2.5-*-GPTQ-Int4,
Qwen/Qwen2-VL-*-GPTQ-Int4, Qwen/Qwen3-*-GPTQ-Int4.
"""


def preset_words(preset: Preset, model_type: str) -> Mapping[str, str]:
    """Return the patterns and words of a preset for a family."""
    release = _OFFICIAL.get(model_type) if preset == "official" else None
    return release.words if release else {}
