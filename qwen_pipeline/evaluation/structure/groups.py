"""Detect quantization groups whose scale or codes do not represent the weights that they were made from.

One group is a few dozen weights of one output: negligible in a layer's norm, but noticeable in answers. Two figures
distinguish a wrong group from rounding, given the group's weights ``w`` and its dequantized codes ``v``:

- its error ``||w - v|| / ||w||``. The norm of a group of small weights counts as at least a tenth of the row's: GPTQ
  compensates there for the rounding of groups of large weights.
- its gain ``<w, v> / <v, v>``, the factor by which its scale is too small. It is used only if ``w`` has both signs:
  symmetric codes reach only 7 of 15 steps above zero, and a group without negative weights is clipped there.

Groups of zeros are checked by :func:`~qwen_pipeline.evaluation.structure.weights.check_padding`.

GPTQ compensates for the rounding of earlier channels in later ones, so codes do not encode the weights alone. Measured
in 221,184 groups of SmolLM2-135M at 4 bits in groups of 64 (GPTQModel 7.6), and in tiny dense and MoE models: errors up
to 0.45, gains from 0.79 to 1.10. In a fine-tune of it (1.8 million groups), outputs with massive activations compensate
much more in their last groups: errors up to 1.40, gains down to 0.34, never above 1.17. So a scale that is halved or
quadrupled can be distinguished from a correct one; a doubled one cannot, from its group alone. Scales may be negative
(:mod:`qwen_pipeline.quantization.steps.scale_search`); one whose sign was changed has a gain of about -1.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

MAX_ERROR = 2.0
MIN_GAIN, MAX_GAIN = -0.5, 1.5
MIN_NORM_SHARE = 0.1
"""The minimum norm of a group, as a share of the root mean square of its row's groups."""


@dataclass(slots=True)
class GroupFaults:
    """The number of wrong groups of a weight, and the first of them.

    Attributes:
        first: Output, group, error and gain; the gain is 0 if the codes decode to zeros.
    """

    count: int = 0
    first: tuple[int, int, float, float] | None = None

    def update(self, start: int, w_OI: Tensor, v_OI: Tensor, g_idx: Tensor) -> None:
        """Add the rows from ``start`` on."""
        groups = int(g_idx.max()) + 1

        def over_groups(values_OI: Tensor) -> Tensor:
            return values_OI.new_zeros(len(values_OI), groups).index_add_(1, g_idx.long(), values_OI)

        norm, error = over_groups(w_OI.square()).sqrt(), over_groups((w_OI - v_OI).square()).sqrt()
        min_norm = MIN_NORM_SHARE * norm.square().mean(dim=1, keepdim=True).sqrt()
        error = torch.where(error > 0, error / torch.maximum(norm, min_norm), 0)
        gain = torch.nan_to_num(over_groups(w_OI * v_OI) / over_groups(v_OI.square()), nan=0, posinf=0, neginf=0)
        signs = over_groups((w_OI > 0).float()).bool() & over_groups((w_OI < 0).float()).bool()
        wrong = ~(error <= MAX_ERROR) | (signs & (norm > min_norm) & ((gain > MAX_GAIN) | (gain < MIN_GAIN)))
        wrong &= norm > 0
        self.count += int(wrong.sum())
        if self.first is None and self.count:
            row, group = wrong.nonzero()[0].tolist()
            self.first = (start + row, group, error[row, group].nan_to_num(nan=inf).item(), gain[row, group].item())

    @property
    def sentence(self) -> str:
        """A description of the first wrong group."""
        assert self.first
        output, group, error, gain = self.first
        scale = f", as if its scale were {1 / gain:.2g} times what it should be" if gain else ""
        return f"output {output}, group {group} differs by {error:.0%} of its norm{scale}"
