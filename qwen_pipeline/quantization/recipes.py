"""Recipes: the steps, beyond GPTQ itself, with which the layer loop chooses codes of the same size and format.

A recipe is data. Each step is a module of :mod:`qwen_pipeline.quantization.steps` that bears its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

RecipeName = Literal["gptq", "fast", "balanced", "best"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch:
    """Settings of the search for the scale of each group.

    Attributes:
        smallest: First factor tried on the scale that gives the largest weight the outermost code.
        largest: Last factor.
        candidates: Number of factors, evenly spaced.
        signed: Whether each scale is tried with both signs. The code without a partner, -8 of 4 bits, then serves the
            outermost weight, whichever sign it has.
    """

    smallest: float = 0.62
    largest: float = 1.16
    candidates: int = 28
    signed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCorrection:
    """Settings of the correction of targets for what earlier quantized layers lost.

    Attributes:
        strength: Share of the correction that is applied; all of it (1) overfits small calibration sets.
    """

    strength: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedRounding:
    """Settings of the learning of a decoder layer's rounding.

    Attributes:
        steps: Number of gradient steps.
        windows: Windows of a step, in whole batches of the forward pass.
        travels: Distances that an offset can move in all steps, in codes, tried in this order until the layer's error
            falls; with 0 only scales are learned. Step sizes fall linearly to 0.
        scale_rate: First learning rate of the relative changes of scales; it falls linearly to 0.
    """

    steps: int
    windows: int = 8
    travels: tuple[float, ...] = (1.0, 0.25, 0.06, 0.0)
    scale_rate: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The steps of a quantization; without any, it is GPTQModel's solver as it is."""

    scale_search: ScaleSearch | None = None
    target_correction: TargetCorrection | None = None
    learned_rounding: LearnedRounding | None = None

    @property
    def compares_models(self) -> bool:
        """True if a step needs the hidden states of the full-precision model."""
        return bool(self.target_correction or self.learned_rounding)


_FAST = Recipe(scale_search=ScaleSearch(), target_correction=TargetCorrection())
RECIPES: Mapping[RecipeName, Recipe] = {
    "gptq": Recipe(),
    "fast": _FAST,
    "balanced": replace(_FAST, learned_rounding=LearnedRounding(steps=50)),
    "best": replace(_FAST, learned_rounding=LearnedRounding(steps=200)),
}
"""Recipes by name. A change of a setting changes the codes, so it needs another code version of the stage."""
